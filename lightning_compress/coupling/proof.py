"""The proof: a network with channels removed computes what the original computes with those channels zeroed.

The check runs on a trial copy, before the user's network is touched, op by op: every tensor of the trial must have the
shape that the labels predict, and its values must be the surviving part of the original's. The first op where they
differ says which channels cannot go after all: those that flow through it are frozen and the plan is made again. Sizes
written into Python (`split(x, 16)`, `view(-1, 512)`) thus cost compression and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.calls import Call, run_calls
from lightning_compress.coupling.graph import Coupling, Mask
from lightning_compress.coupling.labels import Labels
from lightning_compress.coupling.trace import Op, is_seen
from lightning_compress.edits import Keep, apply_edits, skeleton
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["Fault", "Proof", "prove"]


@dataclass(frozen=True)
class Fault:
    """Where the trial copy first went another way than the labels said.

    Attributes:
        index: position of the op among the coupling's ops.
        message: what happened, in words for the report.
    """

    index: int
    message: str


@dataclass(frozen=True)
class Proof:
    """The verdict over one edit.

    Attributes:
        kind: `exact`: equal to the original with the cut channels zeroed. `restricted`: equal when norms and
            reductions over channels run over the surviving ones. `failed`: see `fault`.
        error: largest difference of the outputs, relative to the largest output.
        fault: what went wrong, if anything did.
    """

    kind: str
    error: float = 0.0
    fault: Fault | None = field(default=None)


class _DivergenceError(Exception):
    """Stops the trial run at the first op that differs."""


def prove(coupling: Coupling, keep: Keep, cut: Mask, tolerance: float = 1e-5) -> Proof:
    """Check an edit on a trial copy of the coupling's network.

    Args:
        coupling: the traced network.
        keep: the edit, from `coupling.keep_edit(cut)`.
        cut: the classes it removes.
        tolerance: allowed difference of the outputs, relative to their largest value, in the network's precision.

    Returns:
        The proof, or the fault that says where it broke.
    """
    with without_observers(coupling.model):
        trial = skeleton(coupling.model, lambda tensor: tensor)
    apply_edits(trial, [keep])
    restricted = any(op.restricted and _is_cut(coupling, op, cut) for op in coupling.ops)
    kind = "restricted" if restricted else "exact"
    with undisturbed(coupling.model), undisturbed(trial):
        outputs, fault = _run(trial, coupling.calls, _ShapeCheck(coupling, cut))
        if fault is None:
            error = _outputs_error(coupling, keep, cut, outputs, restricted)
            if error <= tolerance:
                return Proof(kind, error)
            # Rounding in a deep network, or a real difference? Op by op, in double precision.
            error, fault = _compare_ops(coupling, keep, cut, trial, tolerance)
    return Proof(kind, error) if fault is None else Proof("failed", fault=fault)


def _outputs_error(coupling: Coupling, keep: Keep, cut: Mask, outputs: list[Any], restricted: bool) -> float:
    """How far the trial's outputs are from those of the original with the cut channels zeroed."""
    reference = _Reference(coupling, cut, every=False) if restricted else nullcontext()
    try:
        expected = _masked_outputs(coupling.model, coupling.calls, _masked(coupling, keep), reference)
    except _DivergenceError:  # `_compare_ops` will find out where
        return float("inf")
    return _difference(expected, outputs)


def _is_cut(coupling: Coupling, op: Op, cut: Mask) -> bool:
    return any(cut[coupling.classes[vector]].any() for vector in op.vectors())


def _run(trial: nn.Module, calls: Sequence[Call], check: _ShapeCheck | _ValueCheck) -> tuple[list[Any], Fault | None]:
    """Run the trial under a check; the fault is the check's, or the exception that the network raised."""
    torch.manual_seed(0)
    try:
        with check:
            outputs = run_calls(trial, calls)
    except _DivergenceError as error:
        return [], Fault(check.index, str(error))
    except Exception as error:  # noqa: BLE001  whatever user code raises when sizes do not fit is a fault of the plan
        return [], Fault(min(check.index, len(check.coupling.ops) - 1), f"{type(error).__name__}: {error}")
    if check.index < len(check.coupling.ops):
        return [], Fault(check.index, "the network took another way and ran fewer ops")
    return outputs, None


class _ShapeCheck(TorchDispatchMode):
    """Compares the name and the output shapes of each op with what the labels predict."""

    def __init__(self, coupling: Coupling, cut: Mask) -> None:
        super().__init__()
        self.coupling, self.cut, self.index = coupling, cut, 0
        self._counts: dict[int, int] = {}

    def expected(self, shape: tuple[int, ...], labels: Labels) -> tuple[int, ...]:
        """The shape that survives."""
        sizes = list(shape)
        for dim, vector in labels.items():
            if id(vector) not in self._counts:
                self._counts[id(vector)] = int(self.coupling.alive(vector, self.cut).sum())
            sizes[dim] = self._counts[id(vector)]
        return tuple(sizes)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op and compare."""
        result = func(*args, **(kwargs or {}))
        outs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not is_seen(func, outs, args):
            return result
        ops = self.coupling.ops
        if self.index >= len(ops):
            raise _DivergenceError("the network took another way and ran more ops")
        op = ops[self.index]
        if func is not op.func:
            raise _DivergenceError(f"the network took another way: {func} instead of {op.func}")
        for out, shape, labels in zip(outs, op.shapes, op.outputs, strict=False):
            expected = self.expected(shape, labels)
            if tuple(out.shape) != expected:
                raise _DivergenceError(f"expected shape {list(expected)}, got {list(out.shape)}")
        self.check(op, outs)
        self.index += 1
        return result

    def check(self, op: Op, outs: list[Tensor]) -> None:
        """Compare more than shapes; for those who inherit."""


class _Reference(TorchDispatchMode):
    """Runs the original with norms and reductions over channels restricted to the survivors.

    With `every`, the surviving part of what each op made is kept, for comparison.
    """

    def __init__(self, coupling: Coupling, cut: Mask, every: bool = True) -> None:
        super().__init__()
        self.coupling, self.cut, self.every, self.index = coupling, cut, every, 0
        self.kept: list[list[Tensor]] = []

    def survivors(self, tensor: Tensor, labels: Labels) -> Tensor:
        for dim, vector in labels.items():
            living = np.flatnonzero(self.coupling.alive(vector, self.cut))
            if len(living) < len(vector):
                tensor = tensor.index_select(dim, torch.from_numpy(living).to(tensor.device))
        return tensor

    def embed(self, tensor: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], labels: Labels) -> Tensor:
        full = tensor.new_empty_strided(shape, stride).zero_()
        index: list[Any] = [slice(None)] * len(shape)
        for dim, vector in labels.items():
            living = torch.from_numpy(np.flatnonzero(self.coupling.alive(vector, self.cut)))
            view = [1] * len(shape)
            view[dim] = -1
            index[dim] = living.view(view)
        grids = [
            i if isinstance(i, Tensor) else torch.arange(n).view([-1 if d == k else 1 for d in range(len(shape))])
            for k, (i, n) in enumerate(zip(index, shape, strict=True))
        ]
        if not grids:
            return tensor
        full[tuple(grid.to(tensor.device) for grid in grids)] = tensor
        return full

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op, restricted where it must be."""
        kwargs = kwargs or {}
        op = self.coupling.ops[min(self.index, len(self.coupling.ops) - 1)]
        if op.restricted and func is op.func and _is_cut(self.coupling, op, self.cut):
            result = self._restricted(op, args, kwargs)
        else:
            result = func(*args, **kwargs)
        outs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not is_seen(func, outs, args):
            return result
        if self.index >= len(self.coupling.ops) or func is not op.func:
            raise _DivergenceError("with those channels at zero the original takes another way")
        if self.every:
            kept = [self.survivors(o, labels) for o, labels in zip(outs, op.outputs, strict=True)]
            # An op in place would change what was kept, and so would a later one on a view.
            self.kept.append([k.clone() for k in kept])
        self.index += 1
        return result

    def _restricted(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = iter(op.inputs)
        small, small_kwargs = pytree.tree_map_only(Tensor, lambda t: self.survivors(t, next(labels)), (args, kwargs))
        x = small[0]
        if op.name == "native_layer_norm" or op.name == "_fused_rms_norm":
            small = (x, list(x.shape[x.dim() - len(args[1]) :]), *small[2:])
        elif op.name == "native_group_norm":
            small = (*small[:3], x.shape[0], x.shape[1], *small[5:])
        result = op.func(*small, **small_kwargs)
        leaves, spec = pytree.tree_flatten(result)
        full = [self.embed(*parts) for parts in zip(leaves, op.shapes, op.strides, op.outputs, strict=True)]
        return pytree.tree_unflatten(full, spec)


class _ValueCheck(_ShapeCheck):
    """Compares the values of each op with the surviving part of the original's."""

    def __init__(self, coupling: Coupling, cut: Mask, kept: list[list[Tensor]], tolerance: float) -> None:
        super().__init__(coupling, cut)
        self.kept, self.tolerance = kept, tolerance

    def check(self, op: Op, outs: list[Tensor]) -> None:
        if op.name.startswith(("empty", "new_empty")) or not _is_cut(self.coupling, op, self.cut):
            return
        error = _difference(self.kept[self.index], outs)
        if error > self.tolerance:
            raise _DivergenceError(f"differs from the original by {error:.1g} (relative)")


def _masked(coupling: Coupling, keep: Keep) -> dict[str, Tensor]:
    """The original's floating-point parameters with what is cut set to zero."""
    masked: dict[str, Tensor] = {}
    zeroed: dict[int, Tensor] = {}  # tied parameters stay tied
    parameters = dict(coupling.model.named_parameters(remove_duplicate=False))
    for name, dims in keep.slices.items():
        if name in parameters and parameters[name].is_floating_point():
            parameter = parameters[name]
            if id(parameter) not in zeroed:
                mask = torch.ones([1] * parameter.dim(), dtype=parameter.dtype)
                for dim, living in dims.items():
                    alive = torch.zeros(parameter.shape[dim], dtype=parameter.dtype)
                    alive[list(living)] = 1
                    mask = mask * alive.view([-1 if d == dim else 1 for d in range(parameter.dim())])
                zeroed[id(parameter)] = parameter.detach() * mask.to(parameter.device)
            masked[name] = zeroed[id(parameter)]
    return masked


def _masked_outputs(
    model: nn.Module, calls: Sequence[Call], masked: dict[str, Tensor], mode: AbstractContextManager[Any]
) -> list[Any]:
    torch.manual_seed(0)
    with mode:
        return [_call(model, masked, call) for call in calls]


def _call(model: nn.Module, weights: dict[str, Tensor], call: Call) -> Any:
    prefix = f"{call.path}." if call.path else ""
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return functional_call(model.get_submodule(call.path), inside, call.args, dict(call.kwargs))


def _compare_ops(
    coupling: Coupling, keep: Keep, cut: Mask, trial: nn.Module, tolerance: float
) -> tuple[float, Fault | None]:
    """Op by op against the reference, in double precision where the hardware has it."""
    precise = coupling.calls[0].tensors()[0].device.type != "mps"
    kind = torch.float64 if precise else torch.float32

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    with without_observers(coupling.model):
        original, small = skeleton(coupling.model, convert), skeleton(trial, convert)
    calls = [call.map(convert) for call in coupling.calls]
    zeroed = _masked(coupling, keep)
    converted = {id(value): convert(value) for value in zeroed.values()}
    masked = {name: converted[id(value)] for name, value in zeroed.items()}
    with undisturbed(original), undisturbed(small):
        reference = _Reference(coupling, cut)
        try:
            expected = _masked_outputs(original, calls, masked, reference)
        except _DivergenceError as error:
            return 0.0, Fault(min(reference.index, len(coupling.ops) - 1), str(error))
        values = _ValueCheck(coupling, cut, reference.kept, min(tolerance, 1e-8) if precise else tolerance)
        outputs, fault = _run(small, calls, values)
    if fault is not None:
        return 0.0, fault
    gap = _difference(expected, outputs)
    if gap > values.tolerance:  # whatever the ops in between said
        return gap, Fault(len(coupling.ops) - 1, f"the outputs differ from the original's by {gap:.1g} (relative)")
    return gap, None


def _difference(expected: Any, found: Any) -> float:
    """Largest difference between floating-point tensors of two equal structures, relative to the largest value.

    Infinite where either is not a number: of two such tensors nothing is proved.
    """
    worst = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            if a.shape != b.shape:
                return float("inf")
            scale = a.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
            gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs() / scale)
            worst = max(worst, float(gap.nan_to_num(float("inf")).max()))
    return worst
