"""Run a network once and follow the labels of its channels through every aten op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.calls import Call, run_calls
from lightning_compress.coupling.labels import Labels, LabelSpace, Vector
from lightning_compress.edits import named_tensors

__all__ = ["Op", "Tracer", "is_seen", "module_stack"]


@dataclass
class Op:
    """One aten op as it ran.

    Attributes:
        func: the overload.
        args: positional arguments; dropped when the op has been labelled.
        kwargs: keyword arguments; dropped too.
        outs: the tensors it returned, in order; dropped too.
        module: dotted name of the innermost module that was running.
        inputs: labels of its tensor arguments, in order.
        outputs: labels of the tensors it returned.
        shapes: shapes of the tensors it returned.
        strides: their strides, by which code that reshapes decides whether to copy.
        restricted: it reduces or normalises over channels, so what it computes changes when some go.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]
    module: str
    inputs: list[Labels] = field(default_factory=list)
    outputs: list[Labels] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    restricted: bool = False

    @property
    def name(self) -> str:
        """The name of the op without its namespace and overload: `convolution`."""
        return self.func._schema.name.removeprefix("aten::")

    @property
    def where(self) -> str:
        """The op and the module it ran in, for messages."""
        return f"{self.name} in {self.module or 'the network itself'}"

    def vectors(self) -> list[Vector]:
        """All label vectors that flow in or out."""
        return [vector for labels in (*self.inputs, *self.outputs) for vector in labels.values()]


def is_seen(func: OpOverload, outs: Sequence[Tensor], args: Sequence[Any]) -> bool:
    """Whether an op counts when two runs are compared: not those that torch adds as it likes, to alias a tensor."""
    return func not in _ALIASES and (bool(outs) or any(isinstance(argument, Tensor) for argument in args))


_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one op: `constant` x the product of the number of living labels of each vector.

    `once`: they are those of a call, however many samples it has.
    """

    constant: float
    vectors: tuple[Vector, ...]
    once: bool = False


class Tracer(TorchDispatchMode):
    """Follows labels through the ops of one or more runs; what they say accumulates in `space`.

    Attributes:
        space: the labels, their unions and freezes.
        tensors: name -> (tensor, its labels), for every parameter and buffer, under every name.
        ops: what ran, in order.
        costs: multiply-accumulates, op by op.
        attributes: (module, attribute) -> label vectors whose living counts are the attribute's value.
    """

    def __init__(self, model: nn.Module, stack: Callable[[], str]) -> None:
        """Give every index of every dim of every tensor of `model` a label.

        Args:
            model: the network.
            stack: says which module is running (see `module_stack`).
        """
        super().__init__()
        self.space = LabelSpace()
        self.stack = stack
        self.tensors: dict[str, tuple[Tensor, Labels]] = {}
        self.ops: list[Op] = []
        self.costs: list[Cost] = []
        self.attributes: dict[tuple[str, str], tuple[Vector, ...]] = {}
        self.used: set[int] = set()
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # holds the tensors, so that ids stay theirs
        storages: dict[int, Tensor] = {}
        for name, tensor in named_tensors(model):
            if id(tensor) not in self._labels:
                labels = {d: self.space.new(size) for d, size in enumerate(tensor.shape) if size > 1}
                self._labels[id(tensor)] = (tensor, labels)
                if tensor.numel() and tensor.device.type != "meta":
                    other = storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
                    if other is not tensor:
                        for vector in (*labels.values(), *self.of(other).values()):
                            self.space.freeze(vector, f"{name} is a view of another tensor")
            self.tensors[name] = self._labels[id(tensor)]

    def of(self, tensor: Any) -> Labels:
        """The labels of a tensor; none for what is not a tensor, or not known."""
        known = self._labels.get(id(tensor))
        return known[1] if known is not None else {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op, then label what it returned."""
        from lightning_compress.coupling.rules import label_outputs

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        op = Op(func, args, kwargs, outs, self.stack())
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.used.add(id(leaf))
                op.inputs.append(self.of(leaf))
        op.outputs = label_outputs(self, op)
        op.shapes, op.strides = [tuple(out.shape) for out in outs], [out.stride() for out in outs]
        for out, labels in zip(outs, op.outputs, strict=True):
            self._labels[id(out)] = (out, labels)
        op.args, op.kwargs, op.outs = (), {}, []
        if is_seen(func, outs, args):
            self.ops.append(op)
        return result

    # What the rules say, in the words of the rules.

    def freeze(self, labels: Labels, reason: str, dims: Sequence[int] | None = None) -> None:
        """Freeze the labels of some dims (default: all)."""
        for dim, vector in labels.items():
            if dims is None or dim in dims:
                self.space.freeze(vector, reason)

    def join(self, op: Op, *vectors: Vector | None) -> Vector | None:
        """Unite vectors that meet index by index; None stands for data, which freezes the others."""
        known = [vector for vector in vectors if vector is not None]
        if not known:
            return None
        for vector in known[1:]:
            self.space.unite(known[0], vector)
        if len(known) < len(vectors):
            self.space.freeze(known[0], f"meets data in {op.where}")
        return known[0]

    def repeat(self, grid: Vector) -> Vector:
        """Unite the rows of a 2-d grid of labels with its first row, which is returned."""
        first: Vector = np.ascontiguousarray(grid[0])
        if len(grid) > 1:
            self.space.unite(np.tile(first, len(grid) - 1), grid[1:].reshape(-1))
        return first

    def place(self, op: Op, grid: Vector, channel: int | None = None) -> Labels:
        """Find the dim along which a tensor of labels can be cut, uniting what must then go together.

        Args:
            op: the op that made it, for messages.
            grid: one label for each element, in the shape of the tensor.
            channel: the dim to prefer when the labels vary along several.

        Returns:
            The dim and its labels; nothing if the tensor holds a single label, which is frozen.
        """
        varying = [d for d in range(grid.ndim) if (grid != np.take(grid, [0], axis=d)).any()]
        if not varying:
            self.space.freeze(grid.reshape(-1)[:1], f"is taken out alone by {op.where}")
            return {}
        if channel not in varying:
            # (N, C, H, W) made from a flat vector has its channels first; a dim split in two was (groups, channels).
            channel = 1 if varying == [1, 2, 3] else max(varying, key=lambda d: (grid.shape[d], d))
        assert channel is not None
        others = [d for d in range(grid.ndim) if d not in varying]
        block = grid[tuple(0 if d in others else slice(None) for d in range(grid.ndim))]
        block = np.moveaxis(block, varying.index(channel), -1)
        return {channel: self.repeat(block.reshape(-1, grid.shape[channel]))}

    def count(self, constant: float, *vectors: tuple[Vector | None, int], once: bool = False) -> None:
        """Record multiply-accumulates: each factor is a label vector, or, where there is none, a plain size."""
        constant *= math.prod(size for vector, size in vectors if vector is None)
        self.costs.append(Cost(constant, tuple(vector for vector, _ in vectors if vector is not None), once))

    def hold(self, op: Op, attribute: str, *vectors: Vector) -> None:
        """The module that runs `op` holds a size in Python that is the number of these labels that live."""
        self.attributes[op.module, attribute] = vectors

    def run(self, model: nn.Module, calls: Sequence[Call]) -> None:
        """Run the network under the tracer; what it returns is frozen."""
        with self:
            outputs = run_calls(model, calls)
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self.freeze(self.of(leaf), "reaches the network's output")

    def finish(self) -> None:
        """Freeze what no run has touched, and let go of the tensors."""
        for name, (tensor, labels) in self.tensors.items():
            if id(tensor) not in self.used:
                self.freeze(labels, f"{name} is not used by the network")
        self._labels = {}


@contextmanager
def module_stack(model: nn.Module) -> Iterator[Callable[[], str]]:
    """While open, yields a function that says which submodule of `model` is running, by dotted name."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()
