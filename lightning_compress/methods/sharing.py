"""Weight sharing: a layer's weights take few values, so that a file needs a short index for each.

The values of a layer are clustered by k-means in one dimension, where the best clustering of sorted values consists of
intervals and is found by dynamic programming; on many values over a fine histogram, then improved on the values
themselves. Zeros stay zeros: they are what pruning left.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.methods.allocation import Option, allocate
from lightning_compress.methods.coding import encode

__all__ = ["MAX_BITS", "Start", "centroids", "cluster", "settle", "share_within", "tie"]

Start = Literal["exact", "linear", "density", "random"]
"""Where k-means starts: from the best clustering of a fine histogram; from values evenly spaced between the extremes
(the choice of Han et al. 2015, as it keeps large weights); from quantiles; from random ones of the weights."""

Floats = NDArray[np.float64]

MAX_BITS = 8
"""Logarithm of the most values that a tensor may share."""

BINS = 1024
"""Values up to which the clustering is the best there is, and bins of the histogram of more of them."""

ROUNDS = 100


def cluster(weight: Tensor, values: int, start: Start = "exact", groups: int = 1) -> tuple[Tensor, Tensor]:
    """Share out the weights of a tensor to few values.

    The squared error is never above that of as many evenly spaced values.

    Args:
        weight: the weights.
        values: how many values other than zero there may be in each group, at least 1.
        start: where k-means starts.
        groups: of output channels (the first dim), in a row and of equal size as nearly as can be; each has values of
            its own. No more than there are channels.

    Returns:
        The values, the first of them zero, then those of each group, [at most groups * values + 1]; and for each weight
        its place among them, int32, in the weight's shape. Weights that are exactly zero, and only they, have place 0.

    Raises:
        ValueError: no values or groups are asked for, an unknown start, or weights that are not finite.

    Example:
        >>> book, code = cluster(torch.tensor([[0.0, 1.0], [1.2, -3.0]]), 2)
        >>> book.tolist(), code.tolist()
        ([0.0, -3.0, 1.100000023841858], [[0, 2], [2, 1]])
    """
    for name, count in (("values", values), ("groups", groups)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}")
    if groups > 1 and weight.dim() > 1:
        return _by_groups(weight, values, start, min(groups, len(weight)))
    if start not in ("exact", "linear", "density", "random"):
        raise ValueError(f"`start` must be one of exact, linear, density, random, got {start!r}")
    flat = weight.detach().cpu().double().numpy().reshape(-1)
    if not np.isfinite(flat).all():
        raise ValueError("weights that are not finite cannot be shared: has training diverged before the edit?")
    alive = flat[flat != 0]
    code = np.zeros(len(flat), np.int32)
    book = np.zeros(0)
    if len(alive):
        ordered = np.sort(alive)
        sums = np.concatenate([[0.0], ordered.cumsum()])
        tries = [_start(ordered, values, start), np.linspace(ordered[0], ordered[-1], values)]
        book = min((_lloyd(ordered, sums, centres) for centres in tries), key=lambda found: _error(ordered, found))
        code[flat != 0] = 1 + np.searchsorted(_borders(book), alive)
    whole = torch.from_numpy(np.concatenate([[0.0], book])).to(weight.device, weight.dtype)
    return whole, torch.from_numpy(code).view(weight.shape).to(weight.device)


def _by_groups(weight: Tensor, values: int, start: Start, groups: int) -> tuple[Tensor, Tensor]:
    books, codes, before = [weight.new_zeros(1)], [], 0
    for part in weight.detach().tensor_split(groups):
        book, code = cluster(part, values, start)
        books.append(book[1:])
        codes.append(torch.where(code > 0, code + before, 0))
        before += len(book) - 1
    return torch.cat(books), torch.cat(codes).to(torch.int32)


def tie(tensor: Tensor, code: Tensor, count: int, average: bool = True) -> Tensor:
    """Give each entry the mean (or sum) over those that share its value; those with place 0 get zero.

    Args:
        tensor: gradients, say, of the code's shape.
        code: for each weight its place among the values.
        count: how many places there are.
        average: the mean; else the sum.
    """
    places = code.reshape(-1).long()
    totals = torch.zeros(count, dtype=torch.float32, device=tensor.device)
    totals.index_add_(0, places, tensor.reshape(-1).float())
    if average:
        totals /= torch.bincount(places, minlength=count).clamp_min(1)
    totals[0] = 0.0
    return totals.to(tensor.dtype)[places].view_as(tensor)


def centroids(weight: Tensor, code: Tensor, count: int) -> Tensor:
    """The mean of the weights at each place; zero at the first."""
    places = code.reshape(-1).long()
    totals = torch.zeros(count, dtype=torch.float64, device=weight.device)
    totals.index_add_(0, places, weight.detach().reshape(-1).double())
    totals /= torch.bincount(places, minlength=count).clamp_min(1)
    totals[0] = 0.0
    return totals.to(weight.dtype)


@torch.no_grad()
def settle(weight: Tensor, code: Tensor, count: int) -> None:
    """Give the weights at each place their mean, in place."""
    weight.copy_(centroids(weight, code, count)[code.long()])


def share_within(
    weights: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    rest: float,
    limit: float,
    start: Start = "exact",
    groups: int = 1,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Codebooks of as many bits as a file may have bytes, each tensor by what its outputs lose for what is saved.

    Args:
        weights: name -> weight.
        norms: name -> norm of each input, see `input_norms`; inputs of others count alike.
        rest: bytes of the file beside these tensors.
        limit: bytes that it may have.
        start: where k-means starts.
        groups: of output channels of each tensor, see `cluster`.

    Returns:
        Name -> values and codes, as `cluster` gives them, of those that share.

    Raises:
        BudgetError: the limit cannot be met, with the lowest that can.
    """
    options = []
    for name, weight in weights.items():
        plain = weight.detach()
        norm = norms.get(name, plain.new_ones(1)).view(1, -1, *[1] * (plain.dim() - 2))
        energy = float((plain * norm).square().sum().clamp_min(1e-30))
        layer = [Option(None, 0.0, {"bytes": float(len(encode(plain)))})]
        for bits in range(MAX_BITS, 0, -1):
            book, code = cluster(plain, 2**bits, start, groups)
            shared = book[code.long()]
            error = float(((plain - shared) * norm).square().sum()) / energy
            layer.append(Option((name, book, code), error, {"bytes": float(len(encode(shared)))}))
        options.append(layer)
    found = allocate(options, {"bytes": rest}, {"bytes": limit})
    return {option.choice[0]: option.choice[1:] for option in found if option.choice is not None}


def _start(ordered: Floats, values: int, start: str) -> Floats:
    distinct = np.unique(ordered)
    if len(distinct) <= values:
        return distinct
    if start == "linear":
        return np.linspace(ordered[0], ordered[-1], values)
    if start == "density":
        return np.quantile(ordered, (np.arange(values) + 0.5) / values)
    if start == "random":
        return np.sort(np.random.default_rng(0).choice(distinct, values, replace=False))
    if len(distinct) <= BINS:
        places, weights = np.unique(ordered, return_counts=True)
        return _best(places, weights.astype(np.float64), values)
    even = np.linspace(ordered[0], ordered[-1], BINS // 2)
    edges = np.unique(np.concatenate([even, np.quantile(ordered, np.linspace(0, 1, BINS // 2))]))
    bins = np.clip(np.searchsorted(edges, ordered, "right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1).astype(np.float64)
    means = np.bincount(bins, ordered, len(edges) - 1)[counts > 0] / counts[counts > 0]
    return _best(means, counts[counts > 0], values)


def _best(places: Floats, weights: Floats, values: int) -> Floats:
    """The best clustering of weighted places, ascending, by dynamic programming (Wang and Song 2011, Ckmeans.1d.dp)."""
    size = len(places)
    values = min(values, size)
    total = np.concatenate([[0.0], weights.cumsum()])
    centre = np.average(places, weights=weights)
    shifted = places - centre  # so that differences of squares keep their digits
    first = np.concatenate([[0.0], (weights * shifted).cumsum()])
    second = np.concatenate([[0.0], (weights * shifted**2).cumsum()])
    empty = np.tri(size + 1, dtype=bool)  # places i .. j - 1, of which there are none
    count = np.where(empty, 1.0, total[None, :] - total[:, None])
    spread = second[None, :] - second[:, None] - (first[None, :] - first[:, None]) ** 2 / count
    cost = np.where(empty, np.inf, np.maximum(spread, 0.0))
    cost[np.diag_indices(size + 1)] = 0.0
    best = cost[0]
    cuts = np.zeros((values, size + 1), np.int64)
    for number in range(1, values):
        with_cut = best[:, None] + cost
        cuts[number] = with_cut.argmin(0)
        best = with_cut[cuts[number], np.arange(size + 1)]
    borders, end = [size], size
    for number in range(values - 1, 0, -1):
        end = int(cuts[number, end])
        borders.append(end)
    borders.append(0)
    pairs = [(low, high) for high, low in itertools.pairwise(borders) if high > low]
    return np.array([centre + (first[high] - first[low]) / (total[high] - total[low]) for low, high in reversed(pairs)])


def _lloyd(ordered: Floats, sums: Floats, centres: Floats) -> Floats:
    """k-means on sorted values, from some centres, until nothing changes."""
    for _ in range(ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(ordered, _borders(centres), "left"), [len(ordered)]])
        counts = np.diff(ends)
        new = np.diff(sums[ends])[counts > 0] / counts[counts > 0]
        if len(new) == len(centres) and np.array_equal(new, centres):
            break
        centres = np.unique(new)
    return centres


def _borders(centres: Floats) -> Floats:
    borders: Floats = (centres[1:] + centres[:-1]) / 2
    return borders


def _error(ordered: Floats, centres: Floats) -> float:
    nearest: Any = centres[np.searchsorted(_borders(centres), ordered)]
    return float(np.square(ordered - nearest).sum())
