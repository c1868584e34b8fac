"""Contrastive distillation: the same sample's two embeddings close, different samples' apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    above_zero,
    check_same_batch,
    check_same_shape,
    full_precision,
    unit,
)

__all__ = ["CRD", "crd"]


@full_precision
def crd(student: Tensor, teacher: Tensor, target: Tensor | None = None, *, temperature: float) -> Tensor:
    """Noise-contrastive loss between embeddings, each side being the anchor once; mean over the batch.

    With r = exp(cosine / temperature) / its mean over all pairs that count, and k negatives for the anchor, a pair is
    taken to be of one sample with probability r / (r + k). The loss is - log of it for the anchor's own pair, minus
    the sum over the negatives of the log of its complement. An anchor without negatives counts 0.

    Args:
        student: embeddings [N, D]; they are divided by their norms here.
        teacher: embeddings [N, D].
        target: class indices [N]: only samples of other classes are negatives then.
        temperature: divides the cosines.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        >>> import torch
        >>> apart = torch.eye(4)
        >>> crd(apart, apart, temperature=0.07).item() < crd(apart, apart.flip(0), temperature=0.07).item()
        True
        >>> crd(apart, apart, torch.zeros(4), temperature=0.07).item()  # one class: no negatives
        0.0
    """
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(
            f"CRD compares embeddings [N, D], got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: "
            "its projector makes them"
        )
    check_same_batch("CRD", student, teacher)
    check_same_shape("CRD", student, teacher, "its projector makes embeddings of one size")
    if target is not None and target.shape != student.shape[:1]:
        raise ValueError(f"CRD needs class indices [{student.shape[0]}] as `target`, got {tuple(target.shape)}")
    scores = unit(student) @ unit(teacher).T / temperature
    same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    negative = ~same if target is None else target[:, None] != target[None]
    counted = scores.detach().masked_fill(~(negative | same), -math.inf)
    log_mean = counted.flatten().logsumexp(0) - (negative | same).sum().to(scores.dtype).log()
    # As `negative` is symmetric, sample i has k negatives both as the student's anchor (row i) and as the teacher's.
    k = negative.sum(1).to(scores.dtype)
    offset = log_mean + k.clamp(min=1).log()
    positives = torch.where(k > 0, F.softplus(offset - scores.diagonal()), 0.0)
    negatives = F.softplus(scores - offset[:, None]) + F.softplus(scores - offset)
    return (2 * positives.sum() + torch.where(negative, negatives, 0.0).sum()) / len(scores)


class CRD(DistillationLoss):
    """Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699) within the batch.

    The projector holds a linear head for each side, on the features' average over all places; both are learnt.

    How it differs from the released code: that one keeps an embedding of every training sample in a memory bank, from
    which it draws some 16000 negatives for each sample, and needs to know which samples a batch holds. Here the
    negatives are the batch's other samples, so that there are far fewer of them (larger batches do better), none is
    stale, and gradients flow to both sides of every pair. The constant that scores are divided by, which the released
    code estimates from the first batch, is estimated from each. With labels, negatives of the same class are left
    out, as in that code.

    Args:
        temperature: divides the cosines.
        dim: size of the embeddings.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> loss = CRD(dim=8)
        >>> heads = loss.projector(torch.Size([4, 3, 5, 5]), torch.Size([4, 6]))
        >>> student, teacher = heads(torch.zeros(4, 3, 5, 5), torch.zeros(4, 6))
        >>> student.shape, teacher.shape, loss(student, teacher).shape
        (torch.Size([4, 8]), torch.Size([4, 8]), torch.Size([]))
    """

    def __init__(self, temperature: float = 0.07, dim: int = 128) -> None:
        super().__init__()
        self.temperature = above_zero("temperature", temperature)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"`dim` must be a whole number above 0, got {dim!r}")
        self.dim = dim

    def projector(self, student: Size, teacher: Size) -> nn.Module:
        """A linear head for each side."""
        if len(student) < 2 or len(teacher) < 2:
            raise ValueError(
                f"CRD makes embeddings of features [N, C, ...], got student {tuple(student)} and teacher "
                f"{tuple(teacher)}"
            )
        return _Heads(student[1], teacher[1], self.dim)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `crd`. The teacher's embeddings keep their gradient: the head that makes them learns by it."""
        return crd(student, teacher, target, temperature=self.temperature)


class _Heads(nn.Module):
    """Embeddings of both sides; the teacher's features get no gradient."""

    def __init__(self, student: int, teacher: int, dim: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, dim)
        self.teacher = nn.Linear(teacher, dim)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(_averaged(student)), self.teacher(_averaged(teacher.detach()))


def _averaged(features: Tensor) -> Tensor:
    return features if features.dim() == 2 else features.flatten(2).mean(2)
