"""When edits are due: progress through training turned into epochs or steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.schedule import Schedule

__all__ = ["Milestone", "milestones", "position", "progress"]


@dataclass(frozen=True)
class Milestone:
    """A point of the run at which an edit is due.

    Attributes:
        unit: `epoch` or `step` (of the optimizers).
        at: which one; the edit is made before it.
        amount: how far on the way to the budget the network is to be by then, in (0, 1].
    """

    unit: str
    at: int
    amount: float


def milestones(
    trainer: pl.Trainer, start: float | int, end: float | int, steps: int, schedule: Schedule
) -> list[Milestone]:
    """The milestones of a run, oldest first; those that fall on the same epoch or step are one.

    Runs with a limit of steps are measured in steps, others in epochs. At least one epoch (or step) is left after the
    last edit.

    Raises:
        MisconfigurationException: the run has no end, or the window lies outside of it.
    """
    if trainer.max_steps > 0:
        unit, total = "step", trainer.estimated_stepping_batches
        per_epoch = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    else:
        unit, total, per_epoch = "epoch", trainer.max_epochs or -1, 1
    if not 0 < total < math.inf:
        raise MisconfigurationException(
            "compression needs to know when training ends: give the Trainer `max_epochs` or `max_steps`"
        )
    first, last = (float(v * per_epoch) if isinstance(v, int) else v * total for v in (start, end))
    if first > last:
        raise MisconfigurationException(
            f"`start` is {unit} {first:g} and `end` {unit} {last:g}: `start` must not be after `end`"
        )
    if (isinstance(start, int) and first >= total) or (isinstance(end, int) and last > total):
        raise MisconfigurationException(
            f"edits between {unit} {first:g} and {last:g}, but training ends at {unit} {total:g}"
        )
    amounts: dict[int, float] = {}
    for index in range(steps):
        place = last if steps == 1 and schedule(0.0) < 1 else first + (last - first) * index / max(steps - 1, 1)
        at = min(math.floor(place), int(total) - 1)
        amounts[at] = min(1.0, schedule((index + 1) / steps))
    amounts[max(amounts)] = 1.0
    return [Milestone(unit, at, amount) for at, amount in sorted(amounts.items())]


def position(trainer: pl.Trainer, unit: str) -> float:
    """Where a run is, in the unit of a milestone; inside of epochs in fractions, where their length is known."""
    if unit == "step":
        return float(trainer.global_step)
    batches = trainer.num_training_batches
    inside = trainer.fit_loop.batch_idx / batches if 0 < batches < math.inf else 0.0
    return trainer.current_epoch + max(0.0, inside)


def progress(trainer: pl.Trainer) -> float:
    """The share of its optimizer steps that a run has made; 0 where their number is not known."""
    total = trainer.estimated_stepping_batches
    return trainer.global_step / total if total and math.isfinite(total) else 0.0
