"""Grids: integers that numbers are rounded to, and gradients through the rounding.

Rounding in training is "fake" quantization (Jacob et al. 2018, arXiv 1712.05877): the arithmetic is that of floats
which happen to be multiples of a step. The straight-through estimator passes gradients on to what was rounded, and step
sizes get gradients as in LSQ (Esser et al. 2020, arXiv 1902.08153), LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576) or
PACT (Choi et al. 2018, arXiv 1805.06085).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Grid", "round_to"]


@dataclass(frozen=True)
class Grid:
    """Integers from `low` to `high`.

    Example:
        >>> Grid.signed(8), Grid.unsigned(4).levels
        (Grid(low=-127, high=127), 16)
    """

    low: int
    high: int

    @property
    def levels(self) -> int:
        """How many they are."""
        return self.high - self.low + 1

    @classmethod
    def signed(cls, bits: int) -> Grid:
        """Symmetric, without the lowest integer, so that a change of sign is a change of sign."""
        return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    @classmethod
    def unsigned(cls, bits: int) -> Grid:
        """From zero."""
        return cls(0, 2**bits - 1)


def round_to(x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, rule: str = "lsq") -> Tensor:
    """Values on a grid: `(clamp(round(x / step) + zero, low, high) - zero) * step`, halves to even.

    Args:
        x: values, of any floating-point type; the arithmetic is that of single precision.
        step: one step, or one for each index of the first dim.
        zero: the integer that stands for zero, as a float; None: 0. It is rounded.
        grid: the integers.
        rule: gradient of the step: `lsq`, `lsq+` (that of the zero point as well), `pact` (of what is clipped only).

    Example:
        >>> round_to(torch.tensor([0.26, -0.74, 9.0]), torch.tensor(0.5), None, Grid.signed(3))
        tensor([ 0.5000, -0.5000,  1.5000])
    """
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        rounded: Tensor = _Round.apply(x, step, zero, grid, rule)
        return rounded
    return _on_grid(x.float(), step, zero, grid)[0].to(x.dtype)


def _on_grid(x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounded values, and the integers less the zero point."""
    if step.dim():
        step = step.view(-1, *[1] * (x.dim() - 1))
    offset = step.new_zeros(()) if zero is None else zero.detach().round()
    # Bounds less the zero point, so that nothing is added to what is rounded: x / step may be large.
    integers = (x / step).round_().clamp_(grid.low - offset, grid.high - offset)
    return integers * step, integers


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, rule: str) -> Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.grid, ctx.rule = grid, rule
        return _on_grid(x.float(), step, zero, grid)[0].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, step, zero = ctx.saved_tensors
        wide = step.view(-1, *[1] * (x.dim() - 1)) if step.dim() else step
        offset = step.new_zeros(()) if zero is None else zero.round()
        ratio = x.float() / wide
        integers = ratio.round().clamp_(ctx.grid.low - offset, ctx.grid.high - offset)
        inside = (ratio >= ctx.grid.low - offset - 0.5) & (ratio <= ctx.grid.high - offset + 0.5)
        through = gradient * inside
        for_step = for_zero = None
        if ctx.needs_input_grad[1]:
            outside = gradient.float() - through.float() if ctx.rule == "pact" else gradient.float()
            by_step = outside * integers if ctx.rule == "pact" else outside * (integers - ratio * inside)
            for_step = by_step.flatten(1).sum(1) if step.dim() else by_step.sum()
        if zero is not None and ctx.needs_input_grad[2] and ctx.rule == "lsq+":
            for_zero = -(gradient.float() - through.float()).sum() * step
        return through, for_step, for_zero, None, None
