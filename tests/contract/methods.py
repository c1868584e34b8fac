"""Every method, a row each: how to make its callbacks, and what it promises to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L

from lightning_compress.budget import Budget
from lightning_compress.callbacks.pruning import ChannelPruning


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        callbacks: makes the method's callbacks for a budget; edits before epochs 1 and 3 of 5.
        unit: what the budget is in.
        budget: the fraction that is asked for.
    """

    callbacks: Callable[[Budget], list[L.Callback]]
    unit: str = "macs"
    budget: float = 0.5

    def make(self, fraction: float | None = None) -> list[L.Callback]:
        """The callbacks, for the row's budget or another fraction of it."""
        return self.callbacks(Budget(**{self.unit: self.budget if fraction is None else fraction}))


def _pruning(**options: object) -> Callable[[Budget], list[L.Callback]]:
    return lambda budget: [ChannelPruning(budget, start=1, end=3, steps=2, samples=32, **options)]  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "channel_pruning": Method(_pruning()),
    "channel_pruning_taylor": Method(_pruning(criterion="taylor", floor=0.0), unit="params", budget=0.4),
    "channel_pruning_slimming": Method(_pruning(criterion="bn_scale", sparsity=1e-3, ranking="layer"), budget=0.6),
}
