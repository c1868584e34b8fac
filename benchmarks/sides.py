"""The two sides of the coverage benchmark: each prunes one network and says which indices survived."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.oracle import Kept, named_tensors
from lightning_compress.coupling import prove
from lightning_compress.methods.pruning import prune_channels

__all__ = ["SIDES", "Clock", "Result", "macs_and_params", "ours", "torch_pruning_side"]

Inputs = tuple[Tensor, ...]
_settle = import_module("lightning_compress.coupling.settle")  # the package has a function of this name


class Clock:
    """Adds up wall and processor time over the blocks it is entered for."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


@dataclass(frozen=True)
class Result:
    """A pruned network.

    Attributes:
        model: the network; for both sides the one that was given.
        kept: tensor name -> dim -> surviving indices, of what was cut.
        clock: time from the dense network to the pruned one, own checks included.
        proof: the part of it that went into proving the result, which only our side does.
        frozen: what the tool itself says it left whole, with its reason.
    """

    model: nn.Module
    kept: Kept
    clock: Clock
    proof: Clock
    frozen: dict[str, str]


def ours(model: nn.Module, inputs: Inputs, ratio: float, heads: Sequence[nn.Module]) -> Result:
    """`lightning_compress.methods.pruning.prune_channels`; it needs no telling which layers are heads."""
    clock, proof = Clock(), Clock()

    def timed(*args: Any, **kwargs: Any) -> Any:
        with proof:
            return prove(*args, **kwargs)

    with mock.patch.object(_settle, "prove", timed), clock:
        pruning = prune_channels(model, inputs, ratio=ratio, ranking="layer")
    kept: dict[str, dict[int, Tensor]] = {}
    for edit in pruning.edits:
        for name, dims in edit.slices.items():
            for dim, indices in dims.items():
                # A second edit counts in what the first left.
                before = kept.setdefault(name, {}).get(dim)
                index = torch.tensor(indices)
                kept[name][dim] = index if before is None else before[index]
    return Result(model, kept, clock, proof, dict(pruning.frozen))


def torch_pruning_side(model: nn.Module, inputs: Inputs, ratio: float, heads: Sequence[nn.Module]) -> Result:
    """Torch-Pruning as its README has it: group L2 magnitude, per layer, heads ignored.

    All scores are computed before the first group is cut. In that moment each tensor's values are replaced by their own
    positions (as bit patterns: pruning only moves values), so that the surviving indices can be read off afterwards
    whatever the tool did, and the values put back. The clock stands meanwhile.
    """
    import torch_pruning  # an extra of its own; what needs our side only does without

    clock = Clock()
    with clock:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=list(heads),
            # The defaults are dicts shared by all pruners of a process: layers of earlier networks would stay in them.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        groups = pruner.step(interactive=True)
        group = next(groups, None)

    values = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    for tensor in named_tensors(model).values():
        if tensor.dtype == torch.float32:
            tensor.data = torch.arange(tensor.numel(), dtype=torch.int32).view(torch.float32).view(tensor.shape)

    with clock:
        while group is not None:
            group.prune()
            group = next(groups, None)

    kept = {}
    for name, tensor in named_tensors(model).items():
        if tensor.dtype == torch.float32:
            positions = tensor.detach().contiguous().view(torch.int32).long()
            tensor.data = values[name].flatten()[positions]
            kept[name] = _kept(name, positions, values[name].shape)
    return Result(model, kept, clock, Clock(), {})


SIDES: dict[str, Callable[[nn.Module, Inputs, float, Sequence[nn.Module]], Result]] = {
    "ours": ours,
    "torch-pruning": torch_pruning_side,
}


def _kept(name: str, positions: Tensor, shape: torch.Size) -> dict[int, Tensor]:
    """The surviving indices of each dim, from the surviving positions in the flattened tensor."""
    if positions.dim() != len(shape):
        raise ValueError(f"{name} changed from {len(shape)} to {positions.dim()} dims")
    strides = [reduce(lambda a, b: a * b, shape[d + 1 :], 1) for d in range(len(shape))]
    kept: dict[int, Tensor] = {}
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        index = positions // stride % size
        kept[dim] = index.movedim(dim, 0).reshape(index.shape[dim], -1)[:, 0] if index.numel() else index.new_empty(0)
    rebuilt = torch.zeros_like(positions)
    for dim, index in kept.items():
        rebuilt = rebuilt + (index * strides[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    if not torch.equal(rebuilt, positions):
        raise ValueError(f"{name}: what survives is no product of indices of its dims")
    return kept


def macs_and_params(model: nn.Module, inputs: Inputs) -> tuple[float, int]:
    """Multiply-accumulates of one call, from the ops that really run, and the number of parameters.

    Inputs on the `meta` device are counted without computing.
    """
    model = copy.deepcopy(model).to(inputs[0].device).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2, sum(parameter.numel() for parameter in model.parameters())
