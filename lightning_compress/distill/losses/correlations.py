"""Losses between logits [N, C] that compare relations across the batch as well as within a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    above_zero,
    at_least_zero,
    boolean,
    deviations,
    full_precision,
    unit,
)
from lightning_compress.distill.losses.logits import compared, divergence

__all__ = ["DIST", "MLKD", "dist", "mlkd"]


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of the rows, mean over them."""
    # The eps of the released code: for columns of classes that no sample of the batch belongs to.
    return 1 - (unit(deviations(student), 1e-8) * unit(deviations(teacher), 1e-8)).sum(-1).mean()


@full_precision
def dist(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    standardize: bool,
) -> Tensor:
    """(beta x inter-class + gamma x intra-class relation loss) x temperature squared.

    Each is 1 - Pearson's correlation of the softened probabilities: of each sample over the classes, of each class
    over the batch. Where either side is constant (all of a batch of one, for a class) it is 1, without gradient.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        target: not used.
        beta: factor on the correlation over the classes.
        gamma: factor on the correlation over the batch.
        temperature: divides the logits.
        standardize: take z-scores of the logits first.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> round(dist(z, -z, beta=1.0, gamma=1.0, temperature=1.0, standardize=False).item(), 4)
        4.0
    """
    student, teacher = compared("DIST", student, teacher, standardize)
    student, teacher = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    inter, intra = _uncorrelated(student, teacher), _uncorrelated(student.T, teacher.T)
    return temperature**2 * (beta * inter + gamma * intra)


@full_precision
def mlkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperatures: Sequence[float],
    standardize: bool,
) -> Tensor:
    """Sum over the temperatures of an instance, a batch and a class term.

    The instance term is KD; with softened probabilities P [N, C], the batch term is the squared difference of P P^T
    over N, the class term that of P^T P over C.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        target: not used.
        temperatures: what the logits are divided by, one after the other.
        standardize: take z-scores of the logits first, in the instance term.

    Raises:
        ValueError: shapes that do not go together.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(mlkd(z, -z, temperatures=[1.0], standardize=False).item(), 4)  # 1.5232 + 0 + 0.58
        2.1032
    """
    whole = compared("MLKD", student, teacher, False)
    scores = compared("MLKD", student, teacher, standardize)
    samples, classes = student.shape
    total = student.new_zeros(())
    for temperature in temperatures:
        ours, theirs = (F.log_softmax(side / temperature, 1) for side in scores)
        p, q = (F.softmax(side / temperature, 1) for side in whole)
        batch = (p @ p.T - q @ q.T).square().sum() / samples
        over_classes = (p.T @ p - q.T @ q).square().sum() / classes
        total = total + temperature**2 * divergence(ours, theirs) + batch + over_classes
    return total


class DIST(DistillationLoss):
    """Distillation from a stronger teacher (Huang et al. 2022, arXiv 2205.10536).

    Compares relations instead of values: correlations within each sample and, for each class, over the batch.

    Args:
        beta: factor on the correlation over the classes (inter-class).
        gamma: factor on the correlation over the batch (intra-class).
        temperature: divides the logits; the loss is multiplied by its square.
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427).

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> round(DIST()(z, 3 * z).item(), 4), round(DIST()(z, -z).item(), 4)
        (0.0, 4.0)
    """

    def __init__(
        self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__()
        self.beta = at_least_zero("beta", beta)
        self.gamma = at_least_zero("gamma", gamma)
        self.temperature = above_zero("temperature", temperature)
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `dist`."""
        return dist(
            student,
            teacher.detach(),
            target,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            standardize=self.standardize,
        )


class MLKD(DistillationLoss):
    """Multi-level logit distillation (Jin et al., CVPR 2023).

    Instance, batch and class level, with predictions augmented by several temperatures. The released code also takes
    a second, strongly augmented view of each image and leaves out samples that the teacher is sure of; this is the
    loss as the paper has it, on the one view that the training step makes. It is a sum: with five temperatures its
    gradient is some five times KD's.

    Args:
        temperatures: what the logits are divided by; one term for each.
        standardize: take z-scores of both sides' logits first (Sun et al. 2024, arXiv 2403.01427); in the instance
            term only, as released with that paper.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(MLKD(temperatures=[1.0])(z, -z).item(), 4)
        2.1032
        >>> MLKD()(z, z).item()
        0.0
    """

    def __init__(self, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0), standardize: bool = False) -> None:
        super().__init__()
        if not isinstance(temperatures, Sequence) or not temperatures:
            raise ValueError(f"`temperatures` must be a list of numbers above 0, got {temperatures!r}")
        self.temperatures = tuple(above_zero("temperatures", value) for value in temperatures)
        self.standardize = boolean("standardize", standardize)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `mlkd`."""
        return mlkd(student, teacher.detach(), target, temperatures=self.temperatures, standardize=self.standardize)
