"""Half of each layer of a network is pruned, and the outside oracle says whether the result is right."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.oracle import judge
from lightning_compress.methods.pruning import prune_channels
from tests.networks import randomize

__all__ = ["check_halving"]


def check_halving(model: nn.Module, inputs: tuple[Tensor, ...], most: float = 0.5) -> None:
    """What is left computes exactly what the original does with the rest zeroed, and at most so much of its MACs."""
    randomize(model, 0)
    dense = copy.deepcopy(model)
    pruned = prune_channels(model, inputs, ratio=0.5, ranking="layer")
    kept = {
        name: {dim: torch.tensor(indices) for dim, indices in dims.items()}
        for edit in pruned.edits
        for name, dims in edit.slices.items()
    }
    before, after = pruned.costs["macs"]
    assert after < most * before
    verdict = judge(dense, model, kept, inputs)
    assert verdict.kind == "exact", verdict
