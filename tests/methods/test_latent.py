"""Values from latents: scales that are the best, gradients that are the derivatives where there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.methods.coding import encode
from lightning_compress.methods.latent import TWN_THRESHOLD, Binary, TernaryWeightNetwork, TrainedTernary, XnorNet
from lightning_compress.methods.sharing import cluster
from lightning_compress.methods.soft_kmeans import DifferentiableKMeans, make_latent

NOTHING = torch.empty(0)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(1, 1), (3, 5), (4, 3, 3, 3)]))
    tensor = torch.randn(shape, generator=generator) ** draw(st.sampled_from([1, 3]))
    return tensor * draw(st.sampled_from([0.0, 1e-3, 1.0]))


@settings(max_examples=60, deadline=None)
@given(weight=weights(), factor=st.floats(0.0, 3.0), granularity=st.sampled_from(["layer", "channel"]))
def test_no_other_scale_has_less_error(weight: Tensor, factor: float, granularity: str) -> None:
    """Of ternary weights for the threshold of the paper, and of binary weights."""
    groups = weight.flatten(1) if granularity == "channel" else weight.reshape(1, -1)
    for kind in (TernaryWeightNetwork(granularity), XnorNet(granularity)):
        values = kind.values(weight, NOTHING).view_as(groups)
        for group, own in zip(groups, values, strict=True):
            error = float((group - own).square().sum())
            assert error <= float((group - factor * own).square().sum()) * (1 + 1e-5) + 1e-12
    own = TernaryWeightNetwork(granularity).values(weight, NOTHING).view_as(groups)
    for group, values in zip(groups, own, strict=True):
        assert torch.equal(values != 0, group.abs() > TWN_THRESHOLD * group.abs().mean())
        assert torch.equal(values.sign()[values != 0], group.sign()[values != 0])
        assert len(values.abs().unique()) <= 2


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_gradient_of_xnor_is_that_of_its_scale_with_the_sign_straight_through(granularity: str) -> None:
    weight = (2 * torch.randn(3, 4, 5, dtype=torch.float64)).requires_grad_()
    gradient = torch.randn_like(weight)

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.sign(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradients[0] * (x.abs() <= 1)

    dims = (1, 2) if granularity == "channel" else (0, 1, 2)
    values = Sign.apply(weight) * weight.abs().mean(dims, keepdim=True)
    kind = XnorNet(granularity)
    assert torch.equal(kind.values(weight.detach(), NOTHING), values.detach())
    values.backward(gradient)
    assert weight.grad is not None
    assert torch.allclose(kind.gradient(weight.detach(), NOTHING, gradient), weight.grad, rtol=1e-12)


def test_the_scales_of_trained_ternary_weights_follow_the_loss() -> None:
    """Their gradients are those of the values with respect to them; those at the latents are as in the paper."""
    kind, weight = TrainedTernary(), torch.randn(6, 7, dtype=torch.float64)
    memory = kind.begin(weight).requires_grad_()
    at_values = torch.randn_like(weight)
    kind.values(weight, memory).backward(at_values)
    assert memory.grad is not None
    old = memory.detach()
    slope = memory.grad * torch.tensor([1.0, 1.0, 0.0])  # the unit stays
    at_latents = kind.gradient(weight, old, at_values)
    assert torch.allclose(kind.learn(weight, old, at_latents, 0.01), old - 0.01 * slope, rtol=1e-12)
    limit = 0.05 * weight.abs().max()
    assert torch.allclose(at_latents[weight > limit], old[0] * at_values[weight > limit])
    assert torch.allclose(at_latents[weight < -limit], old[1] * at_values[weight < -limit])
    assert torch.equal(at_latents[weight.abs() <= limit], at_values[weight.abs() <= limit])
    assert float(kind.learn(weight, old, 1e9 * torch.ones_like(weight), 1.0).min()) > 0


def test_trained_scales_do_not_depend_on_the_size_of_weights() -> None:
    """Behind a norm a layer's gradient falls as its weights grow: in a hundredth of the unit it is a hundredfold."""
    kind, weight, gradient = TrainedTernary(), torch.randn(6, 7), torch.randn(6, 7)
    memories = []
    for factor in (1.0, 0.01):
        memory = kind.begin(factor * weight)
        at_latents = kind.gradient(factor * weight, memory, gradient / factor)
        memories.append(kind.learn(factor * weight, memory, at_latents, 0.1))
    assert torch.allclose(memories[0][:2], memories[1][:2], rtol=1e-5)
    assert not torch.allclose(memories[0][:2], kind.begin(weight)[:2], rtol=1e-3)


def test_latents_of_binary_weights_stay_within_the_scale() -> None:
    kind, weight = Binary(), torch.tensor([[0.5, -1.5, 0.0]])
    memory = kind.begin(weight)
    latent, _ = kind.follow(torch.tensor([[5.0, -0.25, -7.0]]), memory)
    assert torch.equal(latent, torch.tensor([[2 / 3, -0.25, -2 / 3]]))
    assert len(kind.values(torch.tensor([[0.0, -0.0, 1.0]]), memory).unique()) == 1  # no third value


@pytest.mark.parametrize(("bits", "tau", "seed"), [(1, 0.3, 0), (2, 0.05, 0), (2, 0.2, 1), (3, 0.05, 2), (4, 0.03, 3)])
def test_the_gradient_of_soft_k_means_is_that_of_the_fixed_point(bits: int, tau: float, seed: int) -> None:
    """Against finite differences through all of it, assignments and centroids, in a few directions."""
    torch.manual_seed(seed)
    kind, weight = DifferentiableKMeans(bits, tau), torch.randn(6, 20, dtype=torch.float64)
    start = kind.begin(weight)

    def settled(latent: Tensor) -> tuple[Tensor, Tensor]:
        memory = start
        for _ in range(6):  # more rounds than a step takes
            _, memory = kind.follow(latent, memory)
        return kind.values(latent, memory), memory

    values, memory = settled(weight)
    assert values.shape == weight.shape
    upstream = torch.randn_like(weight)
    ours = kind.gradient(weight, memory, upstream)
    for _ in range(4):
        way, step = torch.randn_like(weight), 1e-7
        change = (settled(weight + step * way)[0] - settled(weight - step * way)[0]) / (2 * step)
        assert float((ours * way).sum()) == pytest.approx(float((upstream * change).sum()), rel=1e-4, abs=1e-4)


def test_the_gradient_of_soft_k_means_equals_autograd_through_unrolled_rounds() -> None:
    kind, weight = DifferentiableKMeans(2, 0.2), torch.randn(5, 30, dtype=torch.float64)
    memory = kind.begin(weight)
    for _ in range(10):
        _, memory = kind.follow(weight, memory)
    latent = weight.clone().requires_grad_()
    centroids = memory[1:]
    for _ in range(200):
        attention = (-(latent.view(-1, 1) - centroids).abs() / memory[0]).softmax(1)
        centroids = (attention * latent.view(-1, 1)).sum(0) / attention.sum(0)
    attention = (-(latent.view(-1, 1) - centroids).abs() / memory[0]).softmax(1)
    values = (attention @ centroids).view_as(latent)
    upstream = torch.randn_like(weight)
    values.backward(upstream)
    assert latent.grad is not None
    assert torch.allclose(kind.values(weight, memory), values.detach(), atol=1e-10)
    assert torch.allclose(kind.gradient(weight, memory, upstream), latent.grad, rtol=1e-6, atol=1e-8)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, weight = DifferentiableKMeans(3), torch.randn(7, 11, dtype=torch.float64)
    upstream, start = torch.randn_like(weight), kind.begin(weight)

    def everything() -> list[Tensor]:
        _, memory = kind.follow(weight, start)
        hard = kind.values(weight, memory, hard=True)
        return [memory, kind.values(weight, memory), hard, kind.gradient(weight, memory, upstream)]

    whole = everything()
    monkeypatch.setattr("lightning_compress.methods.soft_kmeans.CHUNK", 10)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(whole, everything(), strict=True))


@settings(max_examples=20, deadline=None)
@given(weight=weights(), bits=st.integers(1, 4))
def test_at_no_temperature_it_is_k_means(weight: Tensor, bits: int) -> None:
    """Soft values are hard ones, and both are those of the clustering, where this is a fixed point of Lloyd's."""
    kind = DifferentiableKMeans(bits, 1e-9)
    book, code = cluster(weight, 2**bits)
    _, memory = kind.follow(weight, kind.begin(weight))
    hard = kind.values(weight, memory, hard=True)
    assert torch.isfinite(hard).all()
    assert len(hard.unique()) <= 2**bits
    assert torch.allclose(kind.values(weight, memory), hard, rtol=1e-5)
    if weight.any():
        assert torch.allclose(hard, book[code.long()], rtol=1e-4, atol=1e-7)


def test_hard_values_are_the_nearest_centroids() -> None:
    kind, weight = DifferentiableKMeans(2, 0.1), torch.randn(30, 30)
    _, memory = kind.follow(weight, kind.begin(weight))
    hard, soft = (kind.values(weight, memory, hard=flag) for flag in (True, False))
    assert torch.equal(hard, memory[1:][(weight[..., None] - memory[1:]).abs().argmin(-1)])
    assert len(hard.unique()) == 4
    assert len(soft.unique()) > 100


@pytest.mark.parametrize(("kind", "least"), [("binary", 31), ("xnor", 28), ("ternary", 19), ("ttq", 17), ("dkm", 15)])
def test_coded_values_are_small(kind: str, least: float) -> None:
    """Bits of a weight: 1 for two values, less than log2 of 3 for three, 2 for four; and a few for the layer."""
    weight = 0.05 * torch.randn(128, 64, 3, 3)
    method = make_latent(kind)
    latent, memory = method.follow(weight, method.begin(weight))
    values = method.values(latent, memory, hard=True)
    assert weight.numel() * 4 / len(encode(values)) > least


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quaternary"}, "`kind` must be one of binary, xnor, ternary, ttq, dkm, got 'quaternary'"),
        ({"kind": "ttq", "granularity": "channel"}, "`granularity` of kind='ttq' must be layer, got 'channel'"),
        ({"kind": "ternary", "granularity": "row"}, "`granularity` of kind='ternary' must be layer or channel"),
        ({"kind": "binary", "bits": 2}, "`bits` goes with kind='dkm', got bits=2 with kind='binary'"),
        ({"kind": "xnor", "tau": 0.1}, "`tau` goes with kind='dkm'"),
        ({"kind": "dkm", "bits": 9}, "`bits` must be from 1 to 4, got 9; for more use WeightSharing"),
        ({"kind": "dkm", "bits": True}, "`bits` must be from 1 to 4, got True"),
        ({"kind": "dkm", "tau": 0.0}, r"`tau` must be a temperature in \(0, 1\], .* got 0\.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_latent(**arguments)
