"""Losses that compare relations between the samples of a batch; channels and sizes of the features may differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    at_least_zero,
    check_features,
    full_precision,
    unit,
)

__all__ = ["PKT", "RKD", "SP", "pkt", "rkd", "sp"]

# Of the released code of PKT.
_EPS = 1e-7


def _rows(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_features(loss, student, teacher)
    return student.flatten(1), teacher.flatten(1)


@full_precision
def sp(student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean squared difference of the similarity matrices [N, N], their rows divided by their norms.

    Args:
        student: features [N, ...].
        teacher: features [N, ...].
        target: not used.

    Raises:
        ValueError: other numbers of dims or samples.

    Example:
        >>> import torch
        >>> sp(torch.eye(2), torch.eye(2)).item(), sp(torch.eye(2), torch.ones(2, 3)).item() > 0
        (0.0, True)
    """
    ours, theirs = (unit(side @ side.T) for side in _rows("SP", student, teacher))
    return F.mse_loss(ours, theirs)


@full_precision
def rkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    distance_weight: float,
    angle_weight: float,
) -> Tensor:
    """Smooth L1 differences of distances between two samples and of angles between three, weighted.

    Distances are divided by their mean over the pairs of the batch. The angles take N x N x D numbers for features of
    D entries: compare pooled features.

    Args:
        student: features [N, ...].
        teacher: features [N, ...].
        target: not used.
        distance_weight: factor on the distances.
        angle_weight: factor on the angles.

    Raises:
        ValueError: other numbers of dims or samples.

    Example:
        >>> import torch
        >>> f = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd(f, 3 * f + 1, distance_weight=25.0, angle_weight=50.0).item() < 1e-6
        True
    """
    ours, theirs = _rows("RKD", student, teacher)
    total = ours.new_zeros(())
    if distance_weight:
        total = total + distance_weight * F.smooth_l1_loss(_distances(ours), _distances(theirs))
    if angle_weight:
        total = total + angle_weight * F.smooth_l1_loss(_angles(ours), _angles(theirs))
    return total


def _distances(x: Tensor) -> Tensor:
    """Distances [N, N] over their mean. Taken from differences: products would lose what is close."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(x.shape[0] * (x.shape[0] - 1), 1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _angles(x: Tensor) -> Tensor:
    """Cosines [N, N, N] of the angle at the first sample between the ways to the others."""
    ways = unit(x[None] - x[:, None])
    return ways @ ways.transpose(1, 2)


@full_precision
def pkt(student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """KL divergence of the samples' similarities, mean over the N x N pairs.

    A similarity is (cosine + 1) / 2, divided by the sum over its row.

    Args:
        student: features [N, ...].
        teacher: features [N, ...].
        target: not used.

    Raises:
        ValueError: other numbers of dims or samples.

    Example:
        >>> import torch
        >>> pkt(torch.eye(2), torch.eye(2)).item(), pkt(torch.eye(2), torch.ones(2, 3)).item() > 0
        (0.0, True)
    """
    ours, theirs = (_affinities(side) for side in _rows("PKT", student, teacher))
    return (theirs * ((theirs + _EPS).log() - (ours + _EPS).log())).mean()


def _affinities(x: Tensor) -> Tensor:
    directions = unit(x)
    # A cosine may round to a little under -1.
    similarity = ((directions @ directions.T + 1) / 2).clamp(min=0)
    return similarity / similarity.sum(1, keepdim=True)


class SP(DistillationLoss):
    """Similarity-preserving distillation (Tung and Mori 2019, arXiv 1907.09682), of features [N, ...].

    Small numbers: published comparisons weigh it with some 3000.

    Example:
        >>> import torch
        >>> SP()(torch.eye(2), torch.eye(2)).item()
        0.0
    """

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `sp`."""
        return sp(student, teacher.detach(), target)


class RKD(DistillationLoss):
    """Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068), of features [N, ...].

    Args:
        distance_weight: factor on the distances between two samples.
        angle_weight: factor on the angles between three.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> RKD()(torch.eye(3), torch.eye(3)).item()
        0.0
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = at_least_zero("distance_weight", distance_weight)
        self.angle_weight = at_least_zero("angle_weight", angle_weight)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `rkd`."""
        return rkd(
            student,
            teacher.detach(),
            target,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
        )


class PKT(DistillationLoss):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018, arXiv 1803.10837), of features [N, ...].

    Very small numbers: published comparisons weigh it with some 30000.

    Example:
        >>> import torch
        >>> PKT()(torch.eye(2), torch.eye(2)).item()
        0.0
    """

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `pkt`."""
        return pkt(student, teacher.detach(), target)
