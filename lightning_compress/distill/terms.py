"""Which loss is taken between which layers of student and teacher, and how much it counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Loss", "Term", "as_terms"]

Loss = Callable[..., Tensor]
Names = str | Sequence[str] | None


@dataclass(frozen=True)
class Term:
    """One summand of what a student is trained on.

    Attributes:
        loss: called as `loss(student, teacher, target)`; returns a scalar.
        weight: the factor on it.
        student: dotted name of the layer inside the student whose output is compared, or several; None: the student's
            own output.
        teacher: the same inside the teacher, or one for all; None: the names given for the student; the empty name is
            the teacher's output.

    Raises:
        ValueError: as many layers on one side as on the other are needed, a weight that is not a number >= 0.

    Example:
        >>> from lightning_compress.distill.losses import AT, KD
        >>> Term(AT(), student=["layer1", "layer2"], teacher=["stage1", "stage2"]).pairs
        (('layer1', 'stage1'), ('layer2', 'stage2'))
        >>> Term(KD()).pairs
        (('', ''),)
    """

    loss: Loss
    weight: float = 1.0
    student: Names = None
    teacher: Names = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ValueError(
                "`loss` must be a loss, e.g. KD() of lightning_compress.distill.losses, or called as loss(student, "
                f"teacher, target), got {self.loss!r}; several go in a mapping, losses={{'kd': KD(), ...}}"
            )
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must be a number of at least 0, got {self.weight!r}")
        student, teacher = _names(self.student), _names(self.student if self.teacher is None else self.teacher)
        if len(teacher) not in (1, len(student)) or not student:
            raise ValueError(
                f"a term compares layers in pairs, got {len(student)} of the student {list(student)} and "
                f"{len(teacher)} of the teacher {list(teacher)}"
            )

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names in the student and in the teacher; the empty name is the network's own output."""
        student, teacher = _names(self.student), _names(self.student if self.teacher is None else self.teacher)
        return tuple(zip(student, teacher * len(student) if len(teacher) == 1 else teacher, strict=True))

    @property
    def joint(self) -> bool:
        """Whether the loss takes all pairs at once, as lists."""
        return bool(getattr(self.loss, "joint", False))

    @property
    def needs_target(self) -> bool:
        """Whether the loss cannot do without the labels."""
        return bool(getattr(self.loss, "needs_target", False))


def as_terms(losses: Loss | Term | Mapping[str, Loss | Term]) -> dict[str, Term]:
    """Terms by name; a single loss is named by its class.

    Raises:
        ValueError: no loss, or a name that cannot stand in a metric's or a module's name.
    """
    if not isinstance(losses, Mapping):
        loss = losses.loss if isinstance(losses, Term) else losses
        name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", type(loss).__name__)
        losses = {name.lower(): losses}
    if not losses:
        raise ValueError("`losses` is empty: there is nothing to distil by; give a loss, e.g. {'kd': KD()}")
    for name in losses:
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ValueError(f"a loss's name must be a string without dots and slashes, got {name!r}")
    return {name: loss if isinstance(loss, Term) else Term(loss) for name, loss in losses.items()}


def _names(names: Names) -> tuple[str, ...]:
    if names is None:
        return ("",)
    return (names,) if isinstance(names, str) else tuple(names)
