"""Student beside teacher, in validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.targets import find_target
from lightning_compress.distill.metrics import DistillationMetrics
from lightning_compress.distill.taps import logits_of
from lightning_compress.distill.teachers import FrozenTeacher

__all__ = ["Agreement"]


class Agreement:
    """Compares the logits of a student with those of its first teacher on what the student is called with.

    Args:
        student: the module that is called.
        teachers: a list that the callback keeps up to date; while it is empty there is nothing to compare with.
        target: key or index of the labels in a batch.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[FrozenTeacher], target: str | int | None) -> None:
        self.teachers, self.target = teachers, target
        self.batch: Any = None
        self._metrics = DistillationMetrics()
        self._lessons: list[Tensor] = []
        self._listening = False
        self._handles = [
            # Before the student runs, which may work on its input in place.
            student.register_forward_pre_hook(self._teach, with_kwargs=True),
            student.register_forward_hook(self._compare),
        ]

    def start(self) -> None:
        """A validation begins."""
        self._listening = bool(self.teachers)
        self._metrics.reset()

    def finish(self) -> dict[str, Tensor]:
        """It has ended: the figures by name, over all processes; none if there was nothing to compare."""
        self._listening, self.batch = False, None
        values = self._metrics.compute()
        self._metrics.reset()
        return values

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _teach(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._listening and not module.training:
            self._lessons.append(self.teachers[0](args, kwargs)[""])

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _compare(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._listening or module.training:
            return
        teacher, student = self._lessons.pop(), logits_of(output, "student", "")
        if student.dim() != 2 or student.shape != teacher.shape:
            return  # no classes to agree on: a reconstruction, say
        target = find_target(self.batch, self.target, [])
        if target is not None and len(target) != len(student):
            target = None  # the step calls the student with something else than the batch
        self._metrics.update(student.detach(), teacher, target)
