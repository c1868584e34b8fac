"""BatchNorm that computes with its running statistics in training, late, when steps are small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_compress.callbacks.timing import position

__all__ = ["Freezing"]

CALM = 0.2
"""Of the highest learning rate, below which BatchNorm may be frozen: it also keeps steps of full size in bounds."""


class Freezing:
    """Freezes BatchNorm from some point of a run on.

    Attributes:
        unit: `epoch` or `step`.
        at: from which on, epochs in fractions.
        highest: the learning rate so far.
        begun: whether they were frozen once, perhaps by a run that this one goes on from.
    """

    def __init__(self) -> None:
        self.unit, self.at, self.highest = "epoch", float("inf"), 0.0
        self.begun = False
        self._norms: list[nn.Module] = []

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether the point has come; called before each batch."""
        self.highest = max(self.highest, _rate(trainer))
        return position(trainer, self.unit) >= self.at

    def hold(self, trainer: pl.Trainer, norms: Sequence[nn.Module], estimate: Callable[[], None]) -> None:
        """Keep norms in evaluation mode, once the learning rate is small.

        Args:
            trainer: the Trainer.
            norms: which.
            estimate: brings their statistics up to date, once: a running mean lags behind weights that jump.
        """
        if not self._norms and _rate(trainer) <= CALM * self.highest:
            if not self.begun:
                estimate()
            self.begun = True
            self._norms = [norm for norm in norms if norm.training]
        for norm in self._norms:
            norm.eval()

    def end(self) -> None:
        """Put the modes back."""
        for norm in self._norms:
            norm.train()
        self._norms = []


def _rate(trainer: pl.Trainer) -> float:
    rates: list[Any] = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max(map(float, rates), default=0.0)
