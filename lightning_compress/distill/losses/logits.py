"""Losses between logits [N, C] as a whole: softened KL divergence and squared error, and the z-score before either."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    above_zero,
    boolean,
    check_same_batch,
    deviations,
    full_precision,
)

__all__ = ["KD", "LogitMSE", "kd", "logit_mse", "standardized"]

# Of the released code of logit standardisation.
_EPS = 1e-7


def standardized(logits: Tensor) -> Tensor:
    """Each sample's logits as z-scores (Sun et al. 2024, arXiv 2403.01427).

    Student and teacher need no longer agree in scale and shift, only in the relations between classes. The paper
    divides by a base temperature after it: this is the `temperature` of the loss.

    Args:
        logits: [N, C], C at least 2.

    Returns:
        (logits - mean) / (standard deviation + 1e-7) of each row, with C - 1 in the deviation; 0, without gradient,
        where a row is constant.

    Raises:
        ValueError: one class only.

    Example:
        >>> import torch
        >>> standardized(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])).round(decimals=3).tolist()
        [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"`standardize` needs at least 2 classes, got logits {tuple(logits.shape)}")
    centred = deviations(logits)
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (classes - 1) ** 0.5
    return centred / (_EPS + deviation)


def compared(loss: str, student: Tensor, teacher: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    """Both sides' logits, checked, as z-scores where asked for.

    Raises:
        ValueError: not [N, C] with the same N and C.
    """
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(
            f"{loss} compares logits [N, C], got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: "
            "for features take a feature loss"
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{loss} needs the same classes on both sides, got {student.shape[1]} from the student and "
            f"{teacher.shape[1]} from the teacher"
        )
    check_same_batch(loss, student, teacher)
    return (standardized(student), standardized(teacher)) if standardize else (student, teacher)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over the batch, of log-probabilities [N, C]."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@full_precision
def kd(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, *, temperature: float, standardize: bool
) -> Tensor:
    """KL divergence of the softened outputs, times the temperature squared; mean over the batch.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        target: not used.
        temperature: divides the logits.
        standardize: take z-scores of the logits first.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(kd(z, -z, temperature=1.0, standardize=False).item(), 4)
        1.5232
    """
    student, teacher = compared("KD", student, teacher, standardize)
    soft = divergence(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1))
    return temperature**2 * soft


@full_precision
def logit_mse(student: Tensor, teacher: Tensor, target: Tensor | None = None, *, standardize: bool) -> Tensor:
    """Mean squared difference of the logits.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        target: not used.
        standardize: take z-scores of the logits first.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        >>> import torch
        >>> logit_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]), standardize=False).item()
        2.0
    """
    student, teacher = compared("LogitMSE", student, teacher, standardize)
    return F.mse_loss(student, teacher)


class KD(DistillationLoss):
    """Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        temperature: divides the logits; the loss is multiplied by its square, so that its gradient keeps its size.
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(KD(temperature=1.0)(z, -z).item(), 4)
        1.5232
        >>> KD()(z, z).item()
        0.0
    """

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = above_zero("temperature", temperature)
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `kd`."""
        return kd(student, teacher.detach(), target, temperature=self.temperature, standardize=self.standardize)


class LogitMSE(DistillationLoss):
    """Regression of the logits (Ba and Caruana 2014, arXiv 1312.6184), as the mean over samples and classes.

    Twice what KD becomes at a high temperature, for logits of zero mean.

    Args:
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> LogitMSE()(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        2.0
    """

    def __init__(self, standardize: bool = False) -> None:
        super().__init__()
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `logit_mse`."""
        return logit_mse(student, teacher.detach(), target, standardize=self.standardize)
