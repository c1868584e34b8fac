"""Isomorphic ranking: layers of the same structure compete, and each such class loses the same fraction."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.budget import Budget
from lightning_compress.coupling import trace_coupling
from lightning_compress.footprint import measure
from lightning_compress.methods.choosing import Chooser, Selection, structure
from lightning_compress.methods.criteria import score_channels
from lightning_compress.methods.pruning import prune_channels
from tests.contract.nets import conv

X = torch.randn(2, 1, 8, 8)


class Blocks(nn.Module):
    """Residual blocks of one form, with a bottleneck of another form between."""

    def __init__(self, blocks: int = 3, width: int = 20) -> None:
        super().__init__()
        self.stem = conv(1, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(16, width), nn.Conv2d(width, 16, 3, padding=1)) for _ in range(blocks)
        )
        self.narrow = nn.Sequential(conv(16, 40, size=1), nn.Conv2d(40, 16, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.narrow):
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def network(blocks: int = 3) -> Blocks:
    torch.manual_seed(0)
    return Blocks(blocks).eval()


def test_the_structure_of_layers() -> None:
    coupling = trace_coupling(network(), X)
    kinds = defaultdict(list)
    for group in coupling.groups:
        kinds[structure(coupling, group)].append(group.name)
    assert sorted(kinds.values()) == [["blocks.0.0.0", "blocks.1.0.0", "blocks.2.0.0"], ["narrow.0.0"], ["stem.0"]]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_every_class_loses_the_same_fraction(ratio: float) -> None:
    model = network()
    coupling = trace_coupling(model, X)
    scores = score_channels(coupling, "l2")
    scores[coupling.groups[0].classes] *= 100  # in a global ranking this layer would lose nothing
    cut = Chooser(coupling, Selection(ranking="isomorphic", floor=0.0), scores).by_ratio(ratio)
    sizes, gone = defaultdict(int), defaultdict(int)
    for group in coupling.groups:
        sizes[structure(coupling, group)] += len(group.classes)
        gone[structure(coupling, group)] += int(cut[group.classes].sum())
    for kind, size in sizes.items():
        assert gone[kind] == int(ratio * size)
    # Within a class the worst go, whatever their layer.
    inner = np.concatenate([group.classes for group in coupling.groups if group.name.startswith("blocks")])
    worst = inner[np.argsort(scores[inner])[: int(ratio * len(inner))]]
    assert cut[worst].all()


def test_identical_blocks_lose_the_same() -> None:
    model = network()
    for block in model.blocks[1:]:
        block.load_state_dict(model.blocks[0].state_dict())
    prune_channels(model, X, ratio=0.5, ranking="isomorphic")
    assert [block[0][0].out_channels for block in model.blocks] == [10, 10, 10]
    assert (model.stem[0].out_channels, model.narrow[0][0].out_channels) == (8, 20)


def test_a_single_class_is_the_global_ranking() -> None:
    model = network()
    coupling = trace_coupling(model, X)
    others = [group.classes for group in coupling.groups if not group.name.startswith("blocks")]
    coupling.freeze(others, "is wanted")
    scores = score_channels(coupling, "l2")
    one, other = (Chooser(coupling, Selection(ranking=r, floor=0.0), scores) for r in ("isomorphic", "global"))
    assert np.array_equal(one.order, other.order)
    assert np.array_equal(one.by_ratio(0.5), other.by_ratio(0.5))


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("fraction", [0.7, 0.4])
def test_budgets_are_met(fraction: float, round_to: int) -> None:
    model = network()
    before = measure(model, X).macs
    prune_channels(model, X, Budget(macs=fraction), ranking="isomorphic", round_to=round_to)
    assert fraction - (0.03 if round_to == 1 else 0.2) < measure(model, X).macs / before <= fraction
