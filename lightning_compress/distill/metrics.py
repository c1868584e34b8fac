"""How close a student's predictions are to its teacher's, and how well both know what they do not know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError

__all__ = ["DistillationMetrics", "TeacherAgreement", "TeacherKL"]

_BINS = 15


class _TeacherMetric(Metric):
    """A mean over samples of something that student and teacher make together. States add up over processes."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, total: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", total, dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Take a batch in.

        Args:
            student: logits [N, classes]. The metric moves to their device.
            teacher: logits [N, classes].

        Raises:
            ValueError: the shapes differ, or are no [N, classes].
        """
        if student.dim() != 2 or student.shape != teacher.shape:
            raise ValueError(
                "student and teacher must be logits [N, classes] of one shape, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        if self.total.device != student.device:
            self.to(student.device)
        student = student.detach()
        self.total += self._sum(student, teacher.detach().to(student.device))
        self.samples += len(student)

    def compute(self) -> Tensor:
        """The mean over the samples taken in; nan if there were none."""
        return self.total / self.samples

    def _sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Over the samples of a batch."""
        raise NotImplementedError


class TeacherAgreement(_TeacherMetric):
    """The share of samples for which student and teacher predict the same class.

    Fidelity, which is another thing than accuracy (Stanton et al. 2021, arXiv 2106.05945).

    Args:
        options: those of `torchmetrics.Metric`.

    Example:
        >>> agreement = TeacherAgreement()
        >>> agreement.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        >>> agreement.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        super().__init__(torch.tensor(0), **options)

    def _sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.argmax(1) == teacher.argmax(1)).sum()


class TeacherKL(_TeacherMetric):
    """KL(teacher || student) of the predicted distributions, in nats: the mean over the samples.

    In float32 and log space whatever comes in. Not multiplied by the squared temperature, as the loss of Hinton et al.
    (2015, arXiv 1503.02531) is.

    Args:
        temperature: what both logits are divided by.
        options: those of `torchmetrics.Metric`.

    Raises:
        ValueError: `temperature` is not above 0.

    Example:
        >>> kl = TeacherKL()
        >>> kl.update(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log())
        >>> kl.compute()
        tensor(0.6931)
    """

    higher_is_better = False

    def __init__(self, temperature: float = 1.0, **options: Any) -> None:
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        super().__init__(torch.tensor(0.0), **options)
        self.temperature = temperature

    def _sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            ours = F.log_softmax(student.float() / self.temperature, 1)
            theirs = F.log_softmax(teacher.float() / self.temperature, 1)
            # A class that the teacher rules out adds nothing, whatever the student thinks of it.
            terms = torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - ours))
            return terms.sum(1).clamp(min=0).sum()


class DistillationMetrics:
    """Student beside teacher over a validation: agreement, KL divergence and, where there are labels, calibration.

    Calibration is the expected calibration error of Guo et al. (2017, arXiv 1706.04599), with 15 bins. Figures are
    over all processes; each process must have taken in a batch, or none.

    Example:
        >>> metrics = DistillationMetrics()
        >>> metrics.compute()
        {}
        >>> logits = torch.tensor([[0.0, 20.0], [0.0, 20.0]])
        >>> metrics.update(-logits, logits, torch.tensor([1, 0]))
        >>> {name: round(value.item(), 2) for name, value in metrics.compute().items()}
        {'agreement': 0.0, 'kl': 20.0, 'student_ece': 0.5, 'teacher_ece': 0.5}
    """

    def __init__(self) -> None:
        self._pairs: dict[str, _TeacherMetric] = {"agreement": TeacherAgreement(), "kl": TeacherKL()}
        self._calibration: dict[str, Metric] = {}

    def update(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> None:
        """Take a batch in.

        Args:
            student: logits [N, classes].
            teacher: logits [N, classes].
            target: classes, integers [N], if they are known.

        Raises:
            ValueError: the shapes do not go together.
        """
        if target is not None and (target.shape != student.shape[:1] or target.is_floating_point()):
            raise ValueError(
                f"`target` must be {len(student)} classes as integers, got {target.dtype} {tuple(target.shape)}"
            )
        for metric in self._pairs.values():
            metric.update(student, teacher)
        if target is None:
            return
        for name, logits in (("student_ece", student), ("teacher_ece", teacher)):
            if name not in self._calibration:
                self._calibration[name] = MulticlassCalibrationError(logits.shape[1], n_bins=_BINS, norm="l1")
            probabilities = logits.detach().to(student.device).float().softmax(1)
            self._calibration[name].to(student.device).update(probabilities, target.to(student.device))

    def compute(self) -> dict[str, Tensor]:
        """The figures over all that was taken in since `reset`.

        Returns:
            `agreement` and `kl`, and `student_ece` and `teacher_ece` if there were labels; nothing if there was no
            batch.
        """
        metrics = self._pairs | self._calibration
        return {name: metric.compute() for name, metric in metrics.items() if metric.update_called}

    def reset(self) -> None:
        """Forget the batches."""
        for metric in self._pairs.values():
            metric.reset()
        self._calibration.clear()  # the next validation may have another number of classes
