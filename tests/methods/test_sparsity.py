"""Masks: as many zeros as asked for, where the pattern, the allocation and the scores say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.methods.calibration import input_norms
from lightning_compress.methods.sparsity import ALLOCATIONS, Pattern, exchange, make_masks

SHAPES = {"a": (16, 8, 3, 3), "b": (8, 16), "c": (32, 8)}


def scores(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape).abs() * (1 + i) for i, (name, shape) in enumerate(SHAPES.items())}


def zeros(masks: dict[str, Tensor]) -> float:
    return sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@settings(max_examples=60, deadline=None)
@given(
    allocation=st.sampled_from(ALLOCATIONS),
    sparsity=st.floats(0.05, 0.98),
    pattern=st.sampled_from(["unstructured", "block:4x4", "block:2x1"]),
    seed=st.integers(0, 99),
)
def test_as_many_as_asked_for(allocation: str, sparsity: float, pattern: str, seed: int) -> None:
    found, layout = scores(seed), Pattern(pattern)
    masks = make_masks(found, sparsity, layout, allocation)
    group = layout.grouped(found["a"]).shape[1]
    total = sum(value.numel() for value in found.values())
    assert zeros(masks) == pytest.approx(sparsity, abs=2 * group * len(found) / total)
    for name, mask in masks.items():
        groups = layout.grouped(mask)
        assert torch.equal(groups.all(1), groups.any(1))
        assert torch.equal(layout.ungrouped(layout.grouped(found[name]), found[name].shape), found[name])
        means = layout.grouped(found[name]).mean(1)
        alive = groups.any(1)
        if alive.any() and not alive.all():  # within a tensor, the best stay
            assert means[alive].min() >= means[~alive].max()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_n_of_m_inputs_in_every_group(pattern: str, amount: float) -> None:
    keep, of = map(int, pattern.split(":"))
    kept = of - round(amount * (of - keep))
    for name, mask in make_masks(scores(), 0.9, Pattern(pattern), amount=amount).items():
        groups = mask.movedim(1, -1).reshape(-1, of)
        assert (groups.sum(1) == kept).all(), name


def test_whole_kernels() -> None:
    found = {"a": scores()["a"]}
    [mask] = make_masks(found, 0.5, Pattern("kernel")).values()
    kernels = mask.flatten(2)
    assert torch.equal(kernels.all(2), kernels.any(2))
    assert kernels.any(2).float().mean() == 0.5
    assert Pattern("kernel").refuses(torch.zeros(3, 3)) == "has no kernels"


def test_the_floor_keeps_layers_alive() -> None:
    found = {**scores(), "c": scores()["c"] * 1e-6}
    assert not make_masks(found, 0.9, Pattern("unstructured"))["c"].any()
    assert make_masks(found, 0.9, Pattern("unstructured"), floor=0.1)["c"].float().mean() == pytest.approx(
        0.1, abs=0.01
    )


def test_uniform_erk_and_lamp() -> None:
    found = scores()
    uniform = make_masks(found, 0.75, Pattern("unstructured"), "uniform")
    assert all(float(mask.float().mean()) == 0.25 for mask in uniform.values())
    erk = make_masks(found, 0.75, Pattern("unstructured"), "erk")
    raw = {name: sum(shape) / torch.Size(shape).numel() for name, shape in SHAPES.items()}
    density = {name: float(mask.float().mean()) for name, mask in erk.items()}
    assert density["a"] / density["c"] == pytest.approx(raw["a"] / raw["c"], rel=0.05)
    scaled = {name: value * (i + 1) for i, (name, value) in enumerate(found.items())}
    lamp, other = (make_masks(x, 0.75, Pattern("unstructured"), "lamp") for x in (found, scaled))
    assert all(torch.equal(lamp[name], other[name]) for name in lamp)  # a layer's scale does not matter


@pytest.mark.parametrize("name", ["rows", "4:2", "2:2", "0:4", "block:0x2", "block:2", ""])
def test_patterns_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="`pattern` must be"):
        Pattern(name)


@pytest.mark.parametrize(("pattern", "said"), [("2:4", "no multiple of 4"), ("block:4x5", "blocks of 4x5")])
def test_tensors_that_do_not_fit(pattern: str, said: str) -> None:
    assert said in str(Pattern(pattern).refuses(torch.zeros(8, 6)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_exchange_in_any_memory_format(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    plain = (torch.rand(weight.shape) < 0.4).to(torch.uint8)
    other = plain.to(memory_format=memory_format, copy=True)
    exchange(weight, plain, gradient, 0.3)
    exchange(weight.to(memory_format=memory_format), other, gradient.to(memory_format=memory_format), 0.3)
    assert torch.equal(plain, other)


def test_exchange_keeps_the_number() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(20, 20), torch.randn(20, 20)
    mask = (torch.rand(20, 20) < 0.3).to(torch.uint8)
    before, alive = mask.clone(), int(mask.sum())
    moved = exchange(weight * mask, mask, gradient, 0.25)
    assert moved == alive // 4
    assert int(mask.sum()) == alive
    died, born = (before == 1) & (mask == 0), (before == 0) & (mask == 1)
    assert weight[died].abs().max() <= weight[(before == 1) & ~died].abs().min()
    assert gradient[born].abs().min() >= gradient[(before == 0) & ~born].abs().max()


def test_the_norms_of_inputs() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))
    x = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 2.0, 0.0])[None, :, None, None]
    norms = input_norms(net, as_calls(x) + as_calls(x))
    assert torch.allclose(norms["0.weight"], x.square().mean((0, 2, 3)).sqrt())
    assert torch.allclose(norms["2.weight"], net[:2](x).square().mean(0).sqrt())
