"""The figures of a validation against slow references."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_compress.distill.metrics import DistillationMetrics, TeacherAgreement, TeacherKL


def logits(count: int = 50, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """A student, a teacher that is like it, and labels."""
    student = scale * torch.randn(count, classes)
    return student, student + torch.randn(count, classes), torch.randint(classes, (count,))


def slow_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(x / temperature) for x in ours]
        p = [math.exp(x / temperature) for x in theirs]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(student)


def slow_ece(student: Tensor, target: Tensor) -> float:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(student.double().softmax(1).tolist(), target.tolist(), strict=True):
        bins[min(14, int(max(row) * 15))].append((max(row), row.index(max(row)) == label))
    return sum(abs(sum(c for c, _ in some) - sum(hit for _, hit in some)) for some in bins) / len(student)


def slow_agreement(student: Tensor, teacher: Tensor) -> float:
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    return sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs) / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl(temperature: float) -> None:
    student, teacher, _ = logits()
    metric = TeacherKL(temperature)
    metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(slow_kl(student, teacher, temperature), rel=1e-5)


def test_all_figures() -> None:
    student, teacher, target = logits()
    metrics = DistillationMetrics()
    metrics.update(student, teacher, target)
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(
        {
            "agreement": slow_agreement(student, teacher),
            "kl": slow_kl(student, teacher),
            "student_ece": slow_ece(student, target),
            "teacher_ece": slow_ece(teacher, target),
        },
        rel=1e-4,
    )


def test_batches_add_up() -> None:
    student, teacher, target = logits()
    whole, parts = DistillationMetrics(), DistillationMetrics()
    whole.update(student, teacher, target)
    for some in (slice(0, 7), slice(7, 50)):  # a mean of means would be another number
        parts.update(student[some], teacher[some], target[some])
    torch.testing.assert_close(parts.compute(), whole.compute())


@pytest.mark.parametrize("kind", [TeacherAgreement, TeacherKL])
def test_processes_add_up(kind: type[TeacherAgreement | TeacherKL]) -> None:
    student, teacher, _ = logits()
    whole, *ranks = (kind() for _ in range(3))
    whole.update(student, teacher)
    ranks[0].update(student[:7], teacher[:7])
    ranks[1].update(student[7:], teacher[7:])
    merged = kind()
    for name, reduction in merged._reductions.items():  # as torchmetrics does it over processes
        setattr(merged, name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), whole.compute())


def test_nothing_is_not_an_error() -> None:
    metrics = DistillationMetrics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.compute() == {}
        metrics.reset()
        assert metrics.compute() == {}


def test_without_labels_and_after_reset() -> None:
    student, teacher, target = logits()
    metrics = DistillationMetrics()
    metrics.update(student, teacher, target)
    metrics.reset()
    metrics.update(student[:, :3], teacher[:, :3])
    values = metrics.compute()
    assert list(values) == ["agreement", "kl"]
    assert values["kl"].item() == pytest.approx(slow_kl(student[:, :3], teacher[:, :3]), rel=1e-5)
    metrics.reset()
    metrics.update(student[:, :3], teacher[:, :3], target.clamp(max=2))  # another number of classes than before
    assert metrics.compute()["student_ece"].item() == pytest.approx(slow_ece(student[:, :3], target.clamp(max=2)), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    student, teacher, target = logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    low, full = DistillationMetrics(), DistillationMetrics()
    with torch.autocast("cpu", torch.bfloat16):
        low.update(student, teacher, target)
    full.update(student.float(), teacher.float(), target)
    assert low.compute() == full.compute()


def test_kl_of_equals_is_never_negative() -> None:
    metric = TeacherKL()
    for _ in range(20):
        student = 10 * torch.randn(64, 100)
        metric.update(student, student * (1 + 1e-7))
        assert metric.compute() >= 0
    assert metric.compute() < 1e-5


def test_kl_of_extremes() -> None:
    metric = TeacherKL()
    metric.update(torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]]))
    assert metric.compute() == 1000
    metric.reset()
    metric.update(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, -torch.inf]]))
    assert metric.compute() == 0


def test_leaves_no_graph() -> None:
    student, teacher, target = logits()
    metrics = DistillationMetrics()
    metrics.update(student.requires_grad_(), teacher, target)
    assert not any(value.requires_grad for value in metrics.compute().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_where_the_logits_are() -> None:
    student, teacher, target = logits()
    there, here = DistillationMetrics(), DistillationMetrics()
    there.update(student.cuda(), teacher, target)
    here.update(student, teacher, target)
    values = there.compute()
    assert all(value.is_cuda for value in values.values())
    torch.testing.assert_close({name: value.cpu() for name, value in values.items()}, here.compute())


@pytest.mark.parametrize(("a", "b"), [((4, 3), (4, 2)), ((4, 3), (3, 3)), ((4,), (4,)), ((4, 3, 2, 2), (4, 3, 2, 2))])
def test_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    for metric in (TeacherAgreement(), TeacherKL(), DistillationMetrics()):
        with pytest.raises(ValueError, match=r"must be logits \[N, classes\] of one shape, got \(4,.*\) and"):
            metric.update(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("target", [torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 3)])
def test_targets(target: Tensor) -> None:
    metrics = DistillationMetrics()
    with pytest.raises(ValueError, match="`target` must be 4 classes as integers, got torch"):
        metrics.update(torch.zeros(4, 3), torch.zeros(4, 3), target)
    assert metrics.compute() == {}


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"`temperature` must be above 0, got {temperature}"):
        TeacherKL(temperature)
