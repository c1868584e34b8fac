"""Every method, a row each: how to make its callbacks, and what it promises to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch

from lightning_compress.budget import Budget
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.pruning import ChannelPruning
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD, FitNet
from tests.contract.nets import Plain


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        callbacks: makes the method's callbacks for a budget; edits before epochs 1 and 3 of 5.
        unit: what the budget is in.
        budget: the fraction that is asked for; None: the method makes nothing smaller.
    """

    callbacks: Callable[[Budget], list[L.Callback]]
    unit: str = "macs"
    budget: float | None = 0.5

    def make(self, fraction: float | None = None) -> list[L.Callback]:
        """The callbacks, for the row's budget or another fraction of it."""
        return self.callbacks(Budget(**{self.unit: fraction or self.budget or 1.0}))


def _pruning(**options: object) -> Callable[[Budget], list[L.Callback]]:
    return lambda budget: [ChannelPruning(budget, start=1, end=3, steps=2, samples=32, **options)]  # type: ignore[arg-type]


def _taught(budget: Budget) -> list[L.Callback]:
    """By another network; the hint needs a projector. All networks here have a `head`."""
    torch.manual_seed(7)
    hint = Term(FitNet(), weight=0.1, student="head", teacher="hidden")
    return [Distillation(Plain(), {"kd": KD(temperature=2.0), "hint": hint})]


def _taught_by_itself(budget: Budget) -> list[L.Callback]:
    losses = {"kd": KD(temperature=2.0), "hint": Term(FitNet(), student="head")}
    return [Distillation("self", losses, task_weight=0.5), *_pruning()(budget)]


METHODS: dict[str, Method] = {
    "channel_pruning": Method(_pruning()),
    "channel_pruning_taylor": Method(_pruning(criterion="taylor", floor=0.0), unit="params", budget=0.4),
    "channel_pruning_slimming": Method(_pruning(criterion="bn_scale", sparsity=1e-3, ranking="layer"), budget=0.6),
    "channel_pruning_self_distilled": Method(_taught_by_itself),
    "distillation": Method(_taught, budget=None),
}
