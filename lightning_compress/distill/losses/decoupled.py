"""Losses between logits [N, C] that treat the target class and the others apart."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    above_zero,
    at_least_zero,
    boolean,
    full_precision,
)
from lightning_compress.distill.losses.logits import compared, divergence

__all__ = ["DKD", "NKD", "dkd", "nkd"]


def _labels(loss: str, target: Tensor | None, logits: Tensor) -> Tensor:
    if target is None:
        raise ValueError(f"{loss} needs the labels: pass `target`, class indices [N]")
    if target.shape != logits.shape[:1] or target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"{loss} needs class indices [{logits.shape[0]}] as `target`, got {tuple(target.shape)} of {target.dtype}"
        )
    if logits.shape[1] < 2:
        raise ValueError(f"{loss} needs at least 2 classes, got logits {tuple(logits.shape)}")
    return target.long()[:, None]


def _others(x: Tensor, label: Tensor) -> Tensor:
    """The columns [N, C - 1] of x that are not each row's label: by index, as a mask would have no fixed shape."""
    columns = torch.arange(x.shape[1] - 1, device=x.device)
    return x.gather(1, columns + (columns >= label))


def _target_or_not(log_p: Tensor, label: Tensor) -> Tensor:
    """Logs of p of the target and p of all others [N, 2]; never the log of a sum that may round to 0."""
    return torch.cat([log_p.gather(1, label), _others(log_p, label).logsumexp(1, keepdim=True)], 1)


@full_precision
def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    standardize: bool,
) -> Tensor:
    """(alpha TCKD + beta NCKD) x temperature squared; mean over the batch.

    TCKD is the KL divergence between target and not target, NCKD the one among the other classes.

    Args:
        student: logits [N, C], C at least 2.
        teacher: logits [N, C].
        target: class indices [N].
        alpha: factor on TCKD.
        beta: factor on NCKD.
        temperature: divides the logits.
        standardize: take z-scores of the logits first.

    Raises:
        ValueError: no labels, or shapes that do not go together.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> round(dkd(z, -z, y, alpha=1.0, beta=8.0, temperature=1.0, standardize=False).item(), 4)
        1.5232
    """
    student, teacher = compared("DKD", student, teacher, standardize)
    label = _labels("DKD", target, student)
    student, teacher = student / temperature, teacher / temperature
    tckd = divergence(
        _target_or_not(F.log_softmax(student, 1), label), _target_or_not(F.log_softmax(teacher, 1), label)
    )
    nckd = divergence(F.log_softmax(_others(student, label), 1), F.log_softmax(_others(teacher, label), 1))
    return temperature**2 * (alpha * tckd + beta * nckd)


@full_precision
def nkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    gamma: float,
    temperature: float,
    standardize: bool,
) -> Tensor:
    """Cross-entropy of the target class and, among the others, of their own softmax; mean over the batch.

    - teacher's p of the target x student's log p of it - gamma x temperature squared x (sum over the other classes of
    the teacher's softened p x the student's softened log p, both normalised without the target).

    Args:
        student: logits [N, C], C at least 2.
        teacher: logits [N, C].
        target: class indices [N].
        gamma: factor on the other classes.
        temperature: divides the logits of the other classes.
        standardize: take z-scores of the logits first.

    Raises:
        ValueError: no labels, or shapes that do not go together.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0])
        >>> round(nkd(z, z, y, gamma=1.5, temperature=1.0, standardize=False).item(), 4)  # log(3)/3 + 1.5 log(2)
        1.4059
    """
    student, teacher = compared("NKD", student, teacher, standardize)
    label = _labels("NKD", target, student)
    of_target = F.log_softmax(student, 1).gather(1, label) * F.softmax(teacher, 1).gather(1, label)
    student, teacher = _others(student, label) / temperature, _others(teacher, label) / temperature
    of_others = (F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1)
    return -of_target.mean() - gamma * temperature**2 * of_others.mean()


class DKD(DistillationLoss):
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    Everything stays in log space: written with softmax and log, as usual, it is not finite in float16 where the
    teacher's logits are 20 apart.

    Args:
        alpha: factor on the divergence between target and not target (TCKD).
        beta: factor on the divergence among the other classes (NCKD). The paper takes 1 to 10: the surer the teacher,
            the more.
        temperature: divides the logits; the loss is multiplied by its square.
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[20.0, 0.0]]).half(), torch.tensor([1])
        >>> DKD(temperature=1.0)(-z, z, y).item()
        20.0
    """

    needs_target: ClassVar[bool] = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, standardize: bool = False
    ) -> None:
        super().__init__()
        self.alpha = at_least_zero("alpha", alpha)
        self.beta = at_least_zero("beta", beta)
        self.temperature = above_zero("temperature", temperature)
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `dkd`."""
        return dkd(
            student,
            teacher.detach(),
            target,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            standardize=self.standardize,
        )


class NKD(DistillationLoss):
    """Normalised knowledge distillation (Yang et al. 2023, arXiv 2303.13005).

    A cross-entropy, not a divergence: it is above 0 where student and teacher agree, and its first term, the
    ordinary cross-entropy weighted by the teacher's trust in the label, goes on pulling there.

    Args:
        gamma: factor on the other classes.
        temperature: divides the logits of the other classes; their term is multiplied by its square.
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0])
        >>> round(NKD()(z, z, y).item(), 4)
        1.4059
    """

    needs_target: ClassVar[bool] = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, standardize: bool = False) -> None:
        super().__init__()
        self.gamma = at_least_zero("gamma", gamma)
        self.temperature = above_zero("temperature", temperature)
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `nkd`."""
        return nkd(
            student,
            teacher.detach(),
            target,
            gamma=self.gamma,
            temperature=self.temperature,
            standardize=self.standardize,
        )
