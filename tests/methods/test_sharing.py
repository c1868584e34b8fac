"""Clustering in one dimension: the best there is on few values, never worse than evenly spaced ones, zeros apart."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.methods.sharing import centroids, cluster, tie

STARTS: list[Any] = ["exact", "linear", "density", "random"]


def error(weight: Tensor, book: Tensor, code: Tensor) -> float:
    return float((book[code.long()].double() - weight.double()).square().sum())


def uniform_error(weight: Tensor, values: int) -> float:
    alive = weight[weight != 0].double()
    if not len(alive):
        return 0.0
    grid = torch.linspace(float(alive.min()), float(alive.max()), values, dtype=torch.float64)
    return float((alive[:, None] - grid).abs().min(1).values.square().sum())


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    size = draw(st.sampled_from([1, 2, 7, 60, 3000]))
    tensor = torch.randn(size, generator=generator) ** draw(st.sampled_from([1, 3])) * draw(
        st.sampled_from([1e-3, 1.0])
    )
    if draw(st.booleans()):
        tensor = (tensor * 4).round() / 4
    return tensor * (torch.rand(size, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0])))


@pytest.mark.parametrize("start", STARTS)
@settings(max_examples=40, deadline=None)
@given(weight=weights(), bits=st.integers(0, 6))
def test_never_worse_than_evenly_spaced_values(start: Any, weight: Tensor, bits: int) -> None:
    book, code = cluster(weight, 2**bits, start)
    assert len(book) <= 2**bits + 1
    assert code.dtype == torch.int32
    assert torch.equal(code == 0, weight == 0)
    limit = uniform_error(weight, 2**bits)
    assert error(weight, book, code) <= limit * (1 + 1e-5) + 1e-10 * float(weight.square().sum())
    nearest = (weight[weight != 0].double()[:, None] - book[1:].double()).abs() if len(book) > 1 else None
    if nearest is not None and len(nearest):
        own = nearest.gather(1, code[weight != 0].long()[:, None] - 1)[:, 0]
        assert (own <= nearest.min(1).values * (1 + 1e-4) + 1e-7).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), groups=st.integers(1, 12), bits=st.integers(0, 3))
def test_groups_of_channels_have_their_own_values(seed: int, groups: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 4, 3, generator=generator) * torch.rand(9, 1, 1, generator=generator)
    weight *= torch.rand(9, 4, 3, generator=generator) > 0.3
    book, code = cluster(weight, 2**bits, groups=groups)
    assert torch.equal(code == 0, weight == 0)
    assert code.shape == weight.shape
    parts = list(zip(weight.tensor_split(min(groups, 9)), code.tensor_split(min(groups, 9)), strict=True))
    assert all(len(places[places > 0].unique()) <= 2**bits for _, places in parts)
    for part, places in parts:
        torch.testing.assert_close(book[places.long()], _shared(part, 2**bits))
    assert error(weight, book, code) <= error(weight, *cluster(weight, 2**bits)) * (1 + 1e-5) + 1e-9


def _shared(weight: Tensor, values: int) -> Tensor:
    book, code = cluster(weight, values)
    return book[code.long()]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), values=st.integers(1, 4))
def test_the_best_there_is_on_few_weights(seed: int, values: int) -> None:
    """Against all ways to cut nine sorted weights."""
    weight = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    ordered = np.sort(weight.double().numpy())
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(ordered, cuts))
        for cuts in itertools.combinations(range(1, 9), values - 1)
    )
    assert error(weight, *cluster(weight, values)) == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_as_many_values_as_there_are_lose_nothing() -> None:
    weight = torch.tensor([[0.5, -0.25, 0.0], [3.0, 0.5, 0.0]])
    book, code = cluster(weight, 3)
    assert torch.equal(book[code.long()], weight)
    book, code = cluster(torch.zeros(3, 3), 4)
    assert book.tolist() == [0.0]
    assert not code.any()


def test_a_million_weights_are_clustered_near_the_best() -> None:
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    book, code = cluster(weight, 16)
    assert error(weight, book, code) / weight.numel() == pytest.approx(0.00950, rel=0.01)  # Lloyd-Max of a normal


def test_tying() -> None:
    code = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    gradient = torch.tensor([[5.0, 1.0], [3.0, -4.0]])
    assert tie(gradient, code, 3).tolist() == [[0.0, 2.0], [2.0, -4.0]]
    assert tie(gradient, code, 3, average=False).tolist() == [[0.0, 4.0], [4.0, -4.0]]
    assert centroids(gradient, code, 3).tolist() == [0.0, 2.0, -4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 0), "`values` must be at least 1"),
        ((torch.ones(3), 2, "best"), "`start` must be one of"),
        ((torch.tensor([1.0, float("nan")]), 2), "not finite"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(*cast(Any, arguments))
