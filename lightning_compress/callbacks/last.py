"""What comes last: what other callbacks would do to a network after it is refused before training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.callbacks.timing import milestones
from lightning_compress.schedule import SCHEDULES

__all__ = ["refuse_later", "refuse_shared"]


def refuse_later(trainer: pl.Trainer, last: CompressionCallback, other: CompressionCallback) -> None:
    """Raise if another callback edits the network after one that has to come last has begun.

    Raises:
        MisconfigurationException: it does.
    """
    # Worked out here: a callback that is named later has not done so yet.
    ours, theirs = (milestones(trainer, c.start, c.end, c.steps, SCHEDULES[c.schedule]) for c in (last, other))
    first, end, callbacks = ours[0], theirs[-1], list(trainer.callbacks)  # type: ignore[attr-defined]
    if end.at > first.at or (end.at == first.at and callbacks.index(other) > callbacks.index(last)):
        name, own = type(other).__name__, type(last).__name__
        raise MisconfigurationException(
            f"{own} begins at {first.unit} {first.at}, and {name} edits the network at {end.unit} {end.at}: "
            f"{own.lower()} comes last. Let `end` of {name} be earlier, or `start` of {own} later; in the same epoch, "
            "name it last"
        )


def refuse_shared(other: HeldWeights, network: nn.Module, weights: Sequence[str]) -> None:
    """Raise if weights would have shared or latent values by the time that they are to be quantized."""
    if other.role not in ("code", "latent"):
        return
    theirs = {id(weight) for weight in other.choose(network)[0].values()}
    inner = weights if getattr(other, "ends", True) else weights[1:-1]  # not theirs either
    both = [name for name in inner if id(network.get_parameter(name)) in theirs]
    if both:
        raise MisconfigurationException(
            f"{type(other).__name__} and Quantization both decide on the values of {', '.join(both[:5])}"
            f"{' and others' if len(both) > 5 else ''}: name these layers in `exclude` of one of them"
        )
