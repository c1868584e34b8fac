"""The rank of a weight by empirical variational Bayesian matrix factorization."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

__all__ = ["evbmf_rank", "vbmf_rank"]


def evbmf_rank(matrix: Tensor) -> int:
    """How many components a noisy matrix has, by the global analytic solution of empirical variational Bayes.

    Nakajima, Sugiyama, Babacan and Tomioka 2013, 'Global analytic solution of fully-observed variational Bayesian
    matrix factorization', JMLR 14: the noise variance minimises a free energy in one variable, and a component is kept
    if its singular value exceeds the threshold that belongs to it.

    Args:
        matrix: [L, M].

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 90, generator=generator)
        >>> evbmf_rank(low + 0.1 * torch.randn(40, 90, generator=generator))
        3
    """
    rows, columns = sorted(matrix.shape)
    square = np.sort(torch.linalg.svdvals(matrix.double()).cpu().numpy() ** 2)[::-1]
    ratio = rows / columns
    tau = 2.5129 * np.sqrt(ratio)  # the approximate zero of the stationarity condition
    least = (1 + tau) * (1 + ratio / tau)
    if square.sum() <= 0:
        return 0

    def energy(variance: float) -> float:
        x = square / (columns * variance)
        above = x[x > least]
        rest = x[x <= least]
        z = 0.5 * (above - (1 + ratio) + np.sqrt((above - (1 + ratio)) ** 2 - 4 * ratio))
        value = np.sum(rest - np.log(np.maximum(rest, 1e-300)))
        value += np.sum(above - z) + np.sum(np.log((z + 1) / above)) + ratio * np.sum(np.log(z / ratio + 1))
        return float(value)

    place = min(int(np.ceil(rows / (1 + ratio))) - 1, len(square) - 1)
    upper = square.sum() / (rows * columns)
    tail = square[place:]
    lower = max(square[min(place, len(square) - 1)] / (columns * least), tail.mean() / columns, 1e-12 * upper)
    found = minimize_scalar(energy, bounds=(min(lower, upper), upper), method="bounded")
    return int(np.sum(square > columns * found.x * least))


def vbmf_rank(weight: Tensor, most: Any) -> Any:
    """The rank of a canonical weight, of the kind that a form's largest rank has; at least 1.

    Args:
        weight: [G, O, C, *k].
        most: the form's largest rank: an integer, or one for inputs and one for outputs.

    Returns:
        The mean over groups of `evbmf_rank` (Nakajima et al. 2013), rounded, for outputs or for inputs and outputs.

    Example:
        >>> vbmf_rank(torch.ones(1, 8, 16, 3, 3), (16, 8))
        (1, 1)
    """
    groups = weight.shape[0]

    def mean_rank(unfolded: Tensor) -> int:
        return max(1, round(sum(evbmf_rank(group) for group in unfolded) / groups))

    outputs = mean_rank(weight.flatten(2))
    if isinstance(most, tuple):
        return min(mean_rank(weight.transpose(1, 2).flatten(2)), most[0]), min(outputs, most[1])
    return min(outputs, most)
