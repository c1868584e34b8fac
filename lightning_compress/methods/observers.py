"""Observers: the step and the zero point of a grid, from the values that are to be rounded to it.

`minmax` takes the whole range. `percentile` leaves out a few outliers, `mse` as much as makes the squared error least
(Banner et al. 2018, arXiv 1810.05723), `entropy` as much as loses least information (Migacz 2017, 8-bit inference with
TensorRT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.grids import Grid, round_to
from lightning_compress.wording import NOT_FINITE

__all__ = ["OBSERVERS", "Seen", "grid_for", "steps_for"]

SAMPLE = 1 << 16
"""Values that are kept of each call."""

PERCENTILE = 0.9999
CANDIDATES = 60
BINS = 2048


class Seen:
    """The range of a value over some calls, and a sample of it.

    Example:
        >>> seen = Seen()
        >>> seen.add(torch.tensor([1.0, -2.0]))
        >>> seen.low, seen.high
        (-2.0, 1.0)
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self._samples: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Look at a value.

        Raises:
            ValueError: something in it is not finite.
        """
        flat = value.detach().float().flatten()
        low, high = (float(end) for end in flat.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(NOT_FINITE)
        self.low, self.high = min(self.low, low), max(self.high, high)
        stride = max(1, len(flat) // SAMPLE)
        stride += stride % 2 == 0 and stride > 1  # odd, so that it does not fall in with the sides of an image
        self._samples.append(flat[::stride])

    @property
    def values(self) -> Tensor:
        """The sample, [n], with both ends of the range."""
        ends = self._samples[0].new_tensor([self.low, self.high])
        return torch.cat([*self._samples, ends])


def grid_for(seen: Seen, grid: Grid, observer: str, ceiling: float | None = None) -> tuple[float, float]:
    """The step and the zero point of a value's grid.

    Args:
        seen: the value.
        grid: the integers.
        observer: one of `OBSERVERS`.
        ceiling: the largest value that the grid may reach (ReLU6).

    Returns:
        The step, above zero, and the integer that stands for zero.

    Example:
        >>> seen = Seen()
        >>> seen.add(torch.linspace(-1, 4, 101))
        >>> step, zero = grid_for(seen, Grid.unsigned(8), "minmax")
        >>> round(step, 4), zero
        (0.0196, 51.0)
    """
    low, high = OBSERVERS[observer](seen, grid)
    low, high = min(low, 0.0), max(high, 0.0)  # zero is padded with: it must be on the grid
    if ceiling is not None:
        high = min(high, ceiling)
    if grid.low < 0:  # symmetric
        step = max(-low, high) / grid.high
        return (step, 0.0) if step > 0 else (1.0 / grid.high, 0.0)
    span = high - low
    if not span > 0:  # always zero: any step will do
        return 1.0 / (grid.levels - 1), float(grid.low)
    step = span / (grid.levels - 1)
    return step, float(min(max(round(grid.low - low / step), grid.low), grid.high))


def steps_for(weight: Tensor, grid: Grid, observer: str) -> Tensor:
    """One step for each output of a weight; outputs whose weights are all zero get the largest of the others'.

    Args:
        weight: of any shape, outputs first.
        grid: symmetric.
        observer: `minmax`; any other is `mse`, for there are few weights to one output.

    Example:
        >>> steps_for(torch.tensor([[1.0, -2.0], [0.0, 0.0]]), Grid.signed(2), "minmax")
        tensor([2., 2.])
    """
    rows = weight.detach().float().flatten(1)
    full = rows.abs().amax(1) / grid.high
    best = full
    if observer != "minmax":
        least = torch.full_like(full, torch.inf)
        for fraction in torch.linspace(1.0, 0.1, CANDIDATES).tolist():
            step = (full * fraction).clamp_min(torch.finfo(torch.float32).tiny)
            error = (round_to(rows, step, None, grid) - rows).square().sum(1)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    alive = full > 0
    return torch.where(alive, best, float(best[alive].max()) if alive.any() else 1.0)


def _minmax(seen: Seen, grid: Grid) -> tuple[float, float]:
    return seen.low, seen.high


def _percentile(seen: Seen, grid: Grid) -> tuple[float, float]:
    values = seen.values.cpu().numpy()
    low, high = np.quantile(values, [1 - PERCENTILE, PERCENTILE])
    return float(low), float(high)


def _mse(seen: Seen, grid: Grid) -> tuple[float, float]:
    values = seen.values
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best, least = (low, high), float("inf")
    for fraction in np.linspace(1.0, 0.15, CANDIDATES).tolist():
        ends = low * fraction, high * fraction
        span = ends[1] - ends[0] if grid.low >= 0 else 2 * max(-ends[0], ends[1])
        if not span > 0:
            break
        step = span / (grid.levels - 1)
        zero = float(min(max(round(grid.low - ends[0] / step), grid.low), grid.high)) if grid.low >= 0 else 0.0
        rounded = round_to(values, values.new_tensor(step), values.new_tensor(zero), grid)
        error = float((rounded - values).square().mean())
        if error < least:
            best, least = ends, error
    return best


def _entropy(seen: Seen, grid: Grid) -> tuple[float, float]:
    """The clipping of sizes at which a histogram with as many bins as the grid differs least from the fine one."""
    values = seen.values
    size = max(-seen.low, seen.high)
    if not size > 0:
        return seen.low, seen.high
    histogram = torch.histc(values.abs()[values != 0].cpu(), BINS, 0.0, size).double()
    levels = grid.high if grid.low < 0 else grid.levels // 2 if seen.low < 0 else grid.levels
    best, least = BINS, float("inf")
    for end in [*range(max(levels, BINS // 16), BINS, BINS // 128), BINS]:
        kept = histogram[:end].clone()
        kept[-1] += histogram[end:].sum()
        chunks = F.pad(histogram[:end], (0, -end % levels)).view(levels, -1)
        alive = (chunks > 0).double()
        spread = (chunks.sum(1, True) / alive.sum(1, True).clamp_min(1) * alive).flatten()[:end]
        p, q = kept / kept.sum(), spread / spread.sum().clamp_min(1e-12)
        where = p > 0
        divergence = float((p[where] * (p[where] / q[where].clamp_min(1e-9)).log()).sum())
        if divergence < least:
            best, least = end, divergence
    clip = size * best / BINS
    return max(seen.low, -clip), min(seen.high, clip)


OBSERVERS: Mapping[str, Callable[[Seen, Grid], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
"""Name -> range of values that a grid should cover."""
