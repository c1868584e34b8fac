"""Early exits: classifiers at layers inside a network, taught by its own output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distill.losses.base import DistillationLoss

__all__ = ["EarlyExit"]


class EarlyExit(DistillationLoss):
    """A classifier at a layer, trained on the labels and on a deeper output ("be your own teacher").

    Zhang et al. 2019, arXiv 1905.08094. Used with `Distillation(teacher="exits")`, at layers inside the student and
    with its own output as the teacher's; a hint to deeper features is a `FitNet` term beside it. The classifier is a
    projector: it trains and is in checkpoints with the callback, and is gone from what is deployed.

    Args:
        alpha: share of the loss that comes from the output instead of the labels.
        temperature: of the softmax on both sides.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from lightning_compress.distill import Term
        >>> Term(EarlyExit(alpha=0.5), student=["layer1", "layer2"], teacher="").pairs
        (('layer1', ''), ('layer2', ''))
    """

    needs_target: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.3, temperature: float = 3.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha!r}")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}")
        self.alpha, self.temperature = alpha, temperature

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        """The classifier: from maps [N, C, ...] or vectors [N, C] to logits [N, classes].

        Raises:
            ValueError: the student's side has no channels, or the teacher's are no logits.
        """
        if len(student) < 2 or len(teacher) != 2:
            raise ValueError(
                f"an exit leads from features [N, C, ...] to logits [N, classes], got {tuple(student)} and "
                f"{tuple(teacher)}"
            )
        return _Classifier(student[1], teacher[1])

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Cross-entropy with the labels and with the output at a temperature; logits [N, classes] on both sides."""
        if target is None:
            raise ValueError("EarlyExit needs the labels: say where in the batch with `target`")
        student, teacher = student.float(), teacher.detach().float()
        ours, theirs = (F.log_softmax(logits / self.temperature, dim=-1) for logits in (student, teacher))
        taught = F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * self.temperature**2
        return (1 - self.alpha) * F.cross_entropy(student, target) + self.alpha * taught


class _Classifier(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, classes))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        pooled = student.flatten(2).mean(2) if student.dim() > 2 else student
        return self.layers(pooled), teacher
