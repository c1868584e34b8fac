"""Layers that work in both directions: down is the transpose of up, whatever replaced the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.edits import Replace, apply_edits, describe
from lightning_compress.layers import Chain, Concat, Reorder, Rotated, Sum
from lightning_compress.methods.forms import COMPACT, DECOMPOSITIONS
from lightning_compress.methods.planning import Planner, replace_layers
from lightning_compress.methods.reparameterization import expand
from lightning_compress.methods.sequential import Planned
from lightning_compress.methods.uses import find_uses
from lightning_compress.structured import Circulant, Hashed
from lightning_compress.tied import TiedConv2d, transpose


def assert_transposed(layer: nn.Module, *shape: int) -> None:
    """<A x, z> = <x, A' z>, without the bias."""
    x = torch.randn(2, *shape, dtype=torch.float64)
    layer = layer.double()
    up = layer(x) - layer(torch.zeros_like(x))
    z = torch.randn_like(up)
    down = transpose(layer, z)
    assert down.shape == x.shape
    assert torch.allclose((up * z).sum(), (x * down).sum())


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    data=st.data(),
)
def test_a_convolution(kernel: int, stride: int, dilation: int, groups: int, bias: bool, data: st.DataObject) -> None:
    span = dilation * (kernel - 1) + 1
    padding = data.draw(st.integers(0, span // 2))
    layer = TiedConv2d(4, 6, kernel, stride, padding, dilation, groups, bias)
    assert_transposed(layer, 4, 12, 12)  # a multiple of every stride


@pytest.mark.parametrize(
    "layer",
    [
        Chain(nn.Conv2d(4, 3, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(3, 6, (1, 3), padding=(0, 1))),
        Chain(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(4, 6, 1, groups=2)),
        Chain(nn.Conv2d(4, 3, 1), Concat([nn.Identity(), nn.Conv2d(3, 3, 3, padding=1, groups=3)]), Reorder(6)),
        Sum([nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)]),
        Rotated(4, 8, (3, 3), padding=(1, 1)),
        Circulant(4, 8, 2, kernel_size=(3, 3), padding=(1, 1)),
        Hashed(4, 6, 20, kernel_size=(3, 3), padding=(1, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3)),
        nn.Conv2d(4, 6, 3, padding="valid"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_replaces_one(layer: nn.Module) -> None:
    for part in layer.modules():
        if isinstance(part, Reorder):
            part.order.copy_(torch.randperm(part.channels))
    assert_transposed(layer, 4, 6, 6)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), Circulant(4, 4, 2)])
def test_a_linear_layer(layer: nn.Module) -> None:
    assert_transposed(layer, 4)


def test_what_is_not_linear_has_no_transpose() -> None:
    with pytest.raises(TypeError, match="a ReLU has no transpose"):
        transpose(nn.ReLU(), torch.zeros(1))
    with pytest.raises(ValueError, match='must be "zeros"'):
        TiedConv2d(1, 1, 3, padding_mode="circular")


class UpAndDown(nn.Module):
    """A tied pair between two other layers; `functional` bypasses the layer on the way down."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.tied = TiedConv2d(8, 12, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        code = torch.relu(self.tied(x))
        if self.functional:
            return self.last(nn.functional.conv_transpose2d(code, self.tied.weight, padding=1))
        return self.last(self.tied(code, transposed=True))


FORMS: dict[str, Any] = {**DECOMPOSITIONS, **{name: form() for name, form in COMPACT.items()}}


@pytest.mark.parametrize("name", FORMS)
def test_both_uses_are_replaced_at_once(name: str) -> None:
    """By every low-rank and compact form: one chain stands for the filters, upward and downward."""
    net, x = UpAndDown().eval(), torch.randn(4, 1, 6, 6)
    planner = Planner(net, as_calls(x), [FORMS[name]], exclude=["first", "last"])
    [layer] = planner.replaceable
    assert layer.path == "tied"
    assert len(layer.places) == 2
    assert not layer.informed
    planned = [Planned(layer, planner.forms["tied"], planner.candidates["tied"][-1].rank)]
    result = replace_layers(net, planner, planned, as_calls(x), "data", "test")
    assert len(result.edits) == 1
    assert isinstance(net.tied, Chain)
    y = torch.randn(2, 8, 6, 6)
    z = torch.randn(2, 12, 6, 6)
    tied: nn.Module = net.tied
    bias_free = tied(y) - tied(torch.zeros_like(y))
    assert torch.allclose((bias_free * z).sum(), (y * tied(z, transposed=True)).sum(), atol=1e-3)
    assert net(x).shape == (4, 2, 6, 6)


def test_a_weight_that_other_code_uses_is_left_alone() -> None:
    net, calls = UpAndDown(functional=True), as_calls(torch.randn(2, 1, 6, 6))
    planner = Planner(net, calls, [DECOMPOSITIONS["spatial"]])
    assert "also used outside of its own call" in planner.left["tied"]
    assert "transposed=True" in planner.left["tied"]
    assert id(net.tied.weight) in find_uses(net, calls).outside


def test_branches_that_cannot_be_transposed_are_not_put_in_its_place() -> None:
    net, x = UpAndDown().eval(), torch.randn(4, 1, 6, 6)
    before = net(x)
    [edit] = expand(net, x)
    assert isinstance(edit, Replace)
    assert set(edit.layers) == {"first"}
    assert torch.allclose(net(x), before, atol=1e-5)


def test_its_specification_is_its_own() -> None:
    spec = describe(TiedConv2d(1, 2, 3))
    assert spec is not None
    assert spec["type"] == "TiedConv2d"
    net = UpAndDown()
    apply_edits(net, [])
    assert type(net.tied) is TiedConv2d
