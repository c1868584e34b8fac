"""An independent judge of pruned networks: does the small network compute what it was cut from?

It knows nothing of how a tool decides what to cut. It is given the dense original, the pruned network and, for each
tensor, the indices that survive, and asks in double precision:

1. *exact*: are the outputs those of the original with all removed slices of its parameters set to zero?
2. *restricted*: where norms, means or maxima run over channels the first cannot hold. Then the removed slices are
   set to NaN, and the original is run so that every op leaves out what is NaN (`benchmarks/marked.py`). Are the
   outputs equal to these?

Neither: `unprovable` where NaN met an op for which the mode has no meaning, else `WRONG`. Finally the surviving
values themselves must be those of the original, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.marked import Marked

__all__ = ["Kept", "Verdict", "judge", "named_tensors"]

Kept = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> dim -> surviving indices."""

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verdict:
    """What the judge found.

    Attributes:
        kind: `exact`, `restricted`, `unprovable`, `WRONG`, `no-op` (nothing was cut) or `raised`.
        reason: the ops in the way, or the error.
        error: largest difference of the outputs relative to their largest value, of the better of the two proofs.
        effect: the same between pruned and dense: what the proof could at most have overlooked.
    """

    kind: str
    reason: str = ""
    error: float = float("nan")
    effect: float = float("nan")

    @property
    def correct(self) -> bool:
        """Whether the pruned network computes what it should; a network that was left alone does."""
        return self.kind in ("exact", "restricted", "no-op")


def judge(dense: nn.Module, pruned: nn.Module, kept: Kept, inputs: Sequence[Any]) -> Verdict:
    """Compare a pruned network with what it was cut from.

    Args:
        dense: the original; it is not changed.
        pruned: the network to judge; it is not changed.
        kept: for each tensor that was cut, by its name in `dense`, the surviving indices of each dim that was.
        inputs: positional arguments of both, as they were when the cut was planned.

    Returns:
        The verdict. Whatever the pruned network raises is part of it.
    """
    tensors = dict(named_tensors(dense))
    kept = {name: cut for name, dims in kept.items() if (cut := _really_cut(tensors[name], dims))}
    try:
        found = _outputs(pruned, inputs)
    except Exception as error:  # noqa: BLE001  a pruned network may fail in any way; each is a finding
        return Verdict("raised", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    effect = _difference(_outputs(dense, inputs), found)
    if not kept:
        return Verdict("no-op", effect=effect) if effect <= TOLERANCE else Verdict("WRONG", "nothing was cut", effect)
    stray = _strayed(dense, pruned, kept)
    if stray:
        return Verdict("WRONG", f"{stray} does not hold the original's values", effect=effect)

    error = _difference(_outputs(dense, inputs, _fill(kept, 0.0)), found)
    if error <= TOLERANCE:
        return Verdict("exact", error=error, effect=effect)
    mode = Marked()
    marked = _difference(_outputs(dense, inputs, _fill(kept, float("nan")), mode), found)
    if marked <= TOLERANCE:
        return Verdict("restricted", ", ".join(sorted(mode.reduced)), marked, effect)
    if mode.strange:
        return Verdict("unprovable", ", ".join(sorted(mode.strange)), min(error, marked), effect)
    return Verdict("WRONG", "outputs differ", min(error, marked), effect)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _really_cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {dim: indices for dim, indices in dims.items() if len(indices) < tensor.shape[dim]}


def _strayed(dense: nn.Module, pruned: nn.Module, kept: Kept) -> str:
    """The first tensor of the pruned network that is not the surviving part of the original's."""
    found = named_tensors(pruned)
    for name, tensor in named_tensors(dense).items():
        for dim, indices in kept.get(name, {}).items():
            tensor = tensor.index_select(dim, indices)
        if name not in found or not torch.equal(tensor, found[name]):
            return name
    return ""


def _fill(kept: Kept, value: float) -> Callable[[nn.Module], None]:
    """Sets all removed slices of floating-point parameters (and, to mark them, of buffers) to `value`."""

    def fill(model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in named_tensors(model).items():
            # Zero is a value for a parameter; of a running variance it would make another network.
            if name in kept and tensor.is_floating_point() and (name in parameters or value != 0):
                for dim, indices in kept[name].items():
                    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                    gone[indices] = False
                    tensor.data.index_fill_(dim, gone.nonzero().flatten(), value)

    return fill


def _outputs(
    model: nn.Module, inputs: Sequence[Any], prepare: Callable[[nn.Module], None] | None = None, mode: Any = None
) -> list[Tensor]:
    """The output tensors of a copy in double precision."""
    model = copy.deepcopy(model).double().eval()
    if prepare is not None:
        prepare(model)
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tuple(inputs))
    torch.manual_seed(0)
    with torch.no_grad():
        if mode is None:
            result = model(*inputs)
        else:
            with mode:
                result = model(*inputs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of each tensor; infinite where shapes or NaN differ."""
    if len(expected) != len(found):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst
