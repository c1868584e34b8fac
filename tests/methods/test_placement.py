"""Where quantizers are put: at the ends of what runtimes fuse, in code of any style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.calls import as_calls
from lightning_compress.edits import Companions, apply_edits
from lightning_compress.methods.placement import Placement, find_places
from lightning_compress.methods.posttraining import quantize
from tests.contract.nets import conv
from tests.quantizing import Net, input_beside_what_is_made_of_it


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def sites(placed: Sequence[tuple[str | int, ...]]) -> list[str]:
    """Of arguments, the first is not numbered."""
    return [":".join(str(part) for part in (place[:3] if place[3:] in ((), (0,)) else place)) for place in placed]


@dataclass(frozen=True)
class Case:
    """A network, and where it is to be quantized."""

    make: Callable[[], nn.Module]
    values: list[str]
    inputs: list[str]
    weights: list[str]
    folded: dict[str, str]
    pairs: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] = (3, 8, 8)


def raw(self: Any, x: Tensor) -> Tensor:
    x = F.relu_(F.conv2d(x, self.w, self.b, padding=1))
    return F.linear(x.mean((2, 3)), weight=self.v)


def shared(self: Any, x: Tensor) -> Tensor:
    x = self.act(self.stem(x))
    return self.head(self.act(self.layer(self.act(self.layer(x)))).mean((2, 3)))


def mobile(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    y = self.act(self.n2(self.depth(self.act(self.n1(self.expand(x))))))
    return self.last(x + self.n3(self.project(y)))


def shuffled(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
    return self.head(F.max_pool2d(self.b(x), 2).flatten(1))


def split(self: Any, x: Tensor) -> Tensor:
    a, b = self.a(x).chunk(2, 1)
    return self.last(torch.cat([a, self.b(b)], 1))


def gated(self: Any, x: Tensor) -> Tensor:
    x = self.a(x).relu_()
    return self.last(x * torch.sigmoid(self.g(x)))


def residual(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    y = self.b(self.a(x))
    y += x
    return self.head(y.relu().mean((2, 3)))


CASES: dict[str, Case] = {
    # An in-place ReLU is the same place; what leaves the last linear layer is nobody's input.
    "raw parameters": Case(
        lambda: Net(raw, w=weight(8, 3, 3, 3), b=weight(8), v=weight(4, 8)),
        [":relu:0", ":mean:0"],
        [":conv2d:0"],
        ["w", "v"],
        {},
    ),
    "shared layers": Case(
        lambda: Net(
            shared, stem=nn.Conv2d(3, 8, 1), layer=nn.Conv2d(8, 8, 3), act=nn.ReLU(inplace=True), head=nn.Linear(8, 2)
        ),
        [":relu:0", ":relu:1", ":relu:2", ":mean:0"],
        ["stem:conv2d:0"],
        ["stem.weight", "layer.weight", "head.weight"],
        {},
    ),
    # ReLU6 lets no factor through, so that no scales are exchanged.
    "inverted bottleneck": Case(
        lambda: Net(
            mobile,
            stem=conv(3, 4),
            expand=nn.Conv2d(4, 12, 1, bias=False),
            n1=nn.BatchNorm2d(12),
            depth=nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            n2=nn.BatchNorm2d(12),
            act=nn.ReLU6(),
            project=nn.Conv2d(12, 4, 1, bias=False),
            n3=nn.BatchNorm2d(4),
            last=nn.Conv2d(4, 2, 1),
        ),
        ["stem:relu:0", ":hardtanh:0", ":hardtanh:1", "n3:batch_norm:0", ":add:0", "last:conv2d:0"],
        ["stem.0:conv2d:0"],
        ["stem.0.weight", "expand.weight", "depth.weight", "project.weight", "last.weight"],
        {"stem.1": "stem.0.weight", "n1": "expand.weight", "n2": "depth.weight", "n3": "project.weight"},
    ),
    "channel shuffle": Case(
        lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 8, groups=2), head=nn.Linear(128, 2)),
        ["a:relu:0", "b:relu:0"],
        ["a.0:conv2d:0"],
        ["a.0.weight", "b.0.weight", "head.weight"],
        {"a.1": "a.0.weight", "b.1": "b.0.weight"},
    ),
    "concatenated halves": Case(
        lambda: Net(split, a=conv(3, 8), b=conv(4, 4), last=nn.Conv2d(8, 2, 1)),
        ["a:relu:0", "b:relu:0", ":cat:0", "last:conv2d:0"],
        ["a.0:conv2d:0"],
        ["a.0.weight", "b.0.weight", "last.weight"],
        {"a.1": "a.0.weight", "b.1": "b.0.weight"},
    ),
    "gate": Case(
        lambda: Net(gated, a=nn.Conv2d(3, 8, 1), g=nn.Conv2d(8, 8, 1), last=nn.Conv2d(8, 2, 1)),
        [":relu:0", "g:conv2d:0", ":sigmoid:0", ":mul:0", "last:conv2d:0"],
        ["a:conv2d:0"],
        ["a.weight", "g.weight", "last.weight"],
        {},
    ),
    # A sum is rounded behind its ReLU; the end of a branch, which has none, where it is.
    "residual": Case(
        lambda: Net(residual, stem=conv(3, 8), a=conv(8, 8), b=nn.Conv2d(8, 8, 3, padding=1), head=nn.Linear(8, 2)),
        ["stem:relu:0", "a:relu:0", "b:conv2d:0", ":relu:0", ":mean:0"],
        ["stem.0:conv2d:0"],
        ["stem.0.weight", "a.0.weight", "b.weight", "head.weight"],
        {"stem.1": "stem.0.weight", "a.1": "a.0.weight"},
        (("a.0.weight", "b.weight"),),
    ),
    # Functions that no runtime carries out on integers stay between floats.
    "transformer-like": Case(
        lambda: Net(
            lambda self, x: self.c(self.norm(torch.tanh(self.b(F.gelu(self.a(x)))))),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 8),
            norm=nn.LayerNorm(8),
            c=nn.Linear(8, 2),
        ),
        ["a:linear:0", ":gelu:0", "b:linear:0", "norm:layer_norm:0"],
        ["a:linear:0"],
        ["a.weight", "b.weight", "c.weight"],
        {},
        shape=(6,),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def place(net: nn.Module, *shape: int) -> Placement:
    return find_places(net, as_calls(torch.randn(2, *shape)))


@every_case
def test_places(case: Case) -> None:
    placed = place(case.make(), *case.shape)
    assert sites(placed.values) == case.values
    assert sites(placed.inputs) == case.inputs
    assert list(placed.weights) == case.weights
    assert dict(placed.folded) == case.folded
    assert tuple((pair.first, pair.second) for pair in placed.pairs) == case.pairs
    assert not placed.left
    assert placed.macs.keys() == set(case.weights)


@every_case
def test_looking_changes_nothing_and_training_mode_does_not_matter(case: Case) -> None:
    net = case.make().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    placed = place(net, *case.shape)
    assert net.training
    assert not any("forward" in vars(module) for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert place(net.eval(), *case.shape) == placed


@every_case
def test_all_that_is_placed_comes_up(case: Case) -> None:
    """In another batch size, too; and rounding is all that changes."""
    net, x = case.make().eval(), torch.randn(32, *case.shape)
    with torch.no_grad():
        before = net(x)
        prepared = quantize(net, x, target="vnni")
        assert prepared.placement == place(case.make().eval(), *case.shape)
        after = net(x[:5])
    assert (after - before[:5]).square().mean() < 0.002 * before.square().mean()
    assert not torch.equal(after, before[:5])


def test_a_relu6_gives_its_ceiling() -> None:
    layers = (nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardtanh(0, 2.5), nn.Conv2d(4, 2, 1))
    placed = place(nn.Sequential(*layers), 3, 8, 8)
    assert dict(placed.limits) == {("", "hardtanh", 0): 6.0, ("", "hardtanh", 1): 2.5}


def test_dropout_before_a_layer_is_not_a_second_rounding() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.drop(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1)))

    placed = place(Net(run, body=conv(3, 8), drop=nn.Dropout(0.2), head=nn.Linear(8, 2)), 3, 8, 8)
    assert sites(placed.values) == ["body:relu:0", ":adaptive_avg_pool2d:0"]


@input_beside_what_is_made_of_it
def test_the_input_beside_what_is_made_of_it(run: Callable[[Any, Tensor], Tensor], width: int) -> None:
    net, x = Net(run, body=conv(3, 3), last=nn.Conv2d(width, 2, 1)).eval(), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        before = net(x)
        quantize(net, x, target="vnni")
        assert (net(x) - before).square().mean() < 0.002 * before.square().mean()


def test_arguments_by_name() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.relu(input=F.conv2d(input=x, weight=self.w, padding=1))
        return F.linear(input=x.mean(dim=(2, 3)), weight=self.v)

    net, x = Net(run, w=weight(8, 3, 3, 3), v=weight(4, 8)), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        before = net(x)
        prepared = quantize(net, x, target="vnni")
        assert sites(prepared.placement.values) == [":relu:0", ":mean:0"]
        assert sites(prepared.placement.inputs) == [":conv2d:0"]
        assert (net(x) - before).square().mean() < 0.002 * before.square().mean()


class TestLeft:
    """Weights that stay as they are, each with a reason; the others are quantized."""

    def left(self, net: nn.Module, *shape: int) -> dict[str, str]:
        return dict(place(net, *shape).left)

    def test_embeddings_transposed_and_tied(self) -> None:
        def run(self: Any, x: Tensor) -> Tensor:
            y = self.up(F.relu(self.a(x)))
            return self.b(y) + F.conv2d(y, self.other.weight)

        tied, other = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        net = Net(
            run, a=nn.Conv2d(3, 8, 1), up=nn.ConvTranspose2d(8, 4, 2, 2), b=tied, other=other, unused=weight(3, 3)
        )
        other.weight = tied.weight
        left = self.left(net, 3, 8, 8)
        assert left == {
            "up.weight": "is used by conv_transpose2d, which runtimes do not carry out on integers",
            "b.weight": "is tied to other.weight",
            "unused": "is no weight of a convolution or linear layer on the data",
        }

    @pytest.mark.parametrize("role", ["code", "latent"])
    def test_shared_and_latent_values(self, role: str) -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        apply_edits(net, [Companions(role, {"0.weight": (8, 4)})])
        x = torch.randn(16, 4)
        prepared = quantize(net, x)
        assert prepared.placement.left == {"0.weight": "has shared or latent values, which another grid would undo"}
        assert list(prepared.edit.weights) == ["2.weight"]
        assert prepared.edit.origin == "quantization"

    def test_values_that_are_not_finite(self) -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        net[0].weight.data[0, 0] = torch.nan
        assert self.left(net, 4) == {"0.weight": "has values that are not finite"}
