"""Losses between logits: finite wherever logits may go, the invariants of the papers, clear refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor

from lightning_compress.distill import losses
from lightning_compress.distill.losses import DIST, DKD, KD, MLKD, NKD, DistillationLoss, LogitMSE, standardized

Make = Callable[..., DistillationLoss]

# Each by temperature and, as a keyword, `standardize`.
LOSSES: dict[str, Make] = {
    "KD": lambda t, **options: KD(temperature=t, **options),
    "LogitMSE": lambda t, **options: LogitMSE(**options),
    "DKD": lambda t, **options: DKD(temperature=t, **options),
    "NKD": lambda t, **options: NKD(temperature=t, **options),
    "DIST": lambda t, **options: DIST(temperature=t, **options),
    "MLKD": lambda t, **options: MLKD(temperatures=[t, t + 1], **options),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
both = pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])


def peaked(labels: list[int], classes: int, gap: float, noise: float = 0.0) -> Tensor:
    """Logits in which the label stands `gap` above all other classes."""
    return gap * F.one_hot(torch.tensor(labels), classes).float() + noise * torch.randn(len(labels), classes)


def value_and_gradient(loss: Any, student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, target)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def check_finite(loss: DistillationLoss, student: Tensor, teacher: Tensor, target: Tensor) -> None:
    value, gradient = value_and_gradient(loss, student, teacher, target)
    assert (value.shape, value.dtype, gradient.dtype) == ((), torch.float32, student.dtype)
    assert value.isfinite(), (loss, student, teacher)
    assert gradient.isfinite().all(), (loss, student, teacher)


@every_loss
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [0, 1, 5, 20, 50, 100])
def test_finite_at_any_gap_and_temperature(make: Make, standardize: bool, dtype: torch.dtype, gap: float) -> None:
    target = torch.tensor([0, 1, 2, 2])
    for temperature in (1, 2, 4, 10, 20):
        loss = make(temperature, standardize=standardize)
        for noise in (0.0, 1.0):
            right = peaked([0, 1, 2, 2], 5, gap, noise).to(dtype)
            wrong = peaked([1, 2, 3, 4], 5, gap, noise).to(dtype)
            for student, teacher in ((right, wrong), (wrong, right), (right, right), (-right, right)):
                check_finite(loss, student, teacher, target)
                check_finite(loss, student[:1], teacher[:1], target[:1])
            two = peaked([0, 1, 0], 2, gap, noise).to(dtype)
            check_finite(loss, two, -two, torch.tensor([0, 0, 1]))


@every_loss
@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("level", [0.0, 0.1, -300.0])
def test_finite_for_constant_logits(make: Make, standardize: bool, dtype: torch.dtype, level: float) -> None:
    constant, varied = torch.full((3, 7), level, dtype=dtype), torch.randn(3, 7).to(dtype)
    target = torch.tensor([0, 1, 6])
    for student, teacher in ((constant, varied), (varied, constant), (constant, constant)):
        for temperature in (1, 20):
            check_finite(make(temperature, standardize=standardize), student, teacher, target)


@pytest.mark.parametrize("loss", [KD(standardize=True), DKD(standardize=True), LogitMSE(True), DIST()], ids=repr)
def test_rounding_of_a_constant_is_no_signal(loss: DistillationLoss) -> None:
    # 0.1 times 7 over 7 is not 0.1 in float32: dividing by what is left would give gradients of 1e7.
    constant = torch.full((6, 7), 0.1) + torch.tensor([0.3, 0.7, 0.9, 1.1, 1.3, 1.7])[:, None]
    _, gradient = value_and_gradient(loss, constant, torch.randn(6, 7), torch.arange(6))
    assert gradient.abs().max() < 1


def test_dkd_where_softmax_and_log_are_not_finite() -> None:
    def literal(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
        mask = F.one_hot(target, student.shape[1]).bool()
        p, q = student.softmax(1), teacher.softmax(1)
        p_t, q_t = p[mask], q[mask]
        p_hat = p[~mask].view(len(p), -1) / p[~mask].view(len(p), -1).sum(1, keepdim=True)
        q_hat = q[~mask].view(len(q), -1) / q[~mask].view(len(q), -1).sum(1, keepdim=True)
        tckd = q_t * (q_t / p_t).log() + (1 - q_t) * ((1 - q_t) / (1 - p_t)).log()
        nckd = (q_hat * (q_hat / p_hat).log()).sum(1)
        return (alpha * tckd + beta * nckd).mean()

    target = torch.tensor([0, 1])
    student, teacher = peaked([0, 1], 4, 20, 0.1), peaked([0, 1], 4, 20, 0.1)
    ours = DKD(alpha=1.0, beta=2.0, temperature=1.0)
    expected, wanted = value_and_gradient(
        lambda s, t, y: literal(s, t, y, 1.0, 2.0), student.half().double(), teacher.half().double(), target
    )
    theirs, their_gradient = value_and_gradient(
        lambda s, t, y: literal(s, t, y, 1.0, 2.0), student.half(), teacher.half(), target
    )
    value, gradient = value_and_gradient(ours, student.half(), teacher.half(), target)
    assert not theirs.isfinite()
    assert not their_gradient.isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-6)  # as fine as float16 holds it


@pytest.mark.parametrize("loss", [KD(), LogitMSE(), DKD(), MLKD(), DIST()], ids=repr)
def test_zero_where_student_and_teacher_agree(loss: DistillationLoss) -> None:
    logits, target = 3 * torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    value, gradient = value_and_gradient(loss, logits, logits, target)
    assert value.abs() < 1e-6
    assert gradient.abs().max() < 1e-6
    assert loss(logits + torch.randn(6, 5), logits, target) > 1e-3


def test_nkd_is_an_entropy_where_student_and_teacher_agree() -> None:
    logits, target = torch.randn(1, 4), torch.tensor([2])
    p = logits.softmax(1)[0, 2]
    others = (logits[:, [0, 1, 3]] / 2).softmax(1)
    expected = -p * p.log() - 0.5 * 4 * (others * others.log()).sum()
    torch.testing.assert_close(NKD(gamma=0.5, temperature=2.0)(logits, logits, target), expected)
    # Among the other classes agreement is the minimum.
    _, gradient = value_and_gradient(NKD(gamma=1e4), logits, logits, target)
    assert gradient[0, [0, 1, 3]].abs().max() < 1


@every_loss
def test_standardized_is_blind_to_shift_and_scale(make: Make) -> None:
    student, teacher, target = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 5, 3])
    shift, scale = 10 * torch.randn(4, 1), torch.tensor([[0.1], [1.0], [7.0], [30.0]])
    if make is LOSSES["MLKD"]:  # batch and class level see the logits as they are
        changed, unchanged = (student + shift, teacher + shift), (student, teacher)
    else:
        changed, unchanged = (student * scale + shift, teacher / scale - shift), (student, teacher)
    loss = make(2.0, standardize=True)
    torch.testing.assert_close(loss(*changed, target), loss(*unchanged, target), rtol=1e-4, atol=1e-5)


def test_standardized_rows() -> None:
    logits = 5 * torch.randn(3, 8) + 2
    scores = standardized(logits)
    expected = (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))
    torch.testing.assert_close(scores, expected)
    with pytest.raises(ValueError, match="at least 2 classes"):
        standardized(torch.zeros(3, 1))


def test_only_the_instance_term_of_mlkd_is_standardized() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    difference = MLKD([2.0], standardize=True)(student, teacher) - MLKD([2.0])(student, teacher)
    expected = KD(2.0, standardize=True)(student, teacher) - KD(2.0)(student, teacher)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)


def test_kd_becomes_regression_of_logits_at_a_high_temperature() -> None:
    student, teacher = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    student, teacher = (side - side.mean(1, keepdim=True) for side in (student, teacher))
    _, soft = value_and_gradient(KD(temperature=1e4), student, teacher, None)
    _, hard = value_and_gradient(LogitMSE(), student, teacher, None)
    torch.testing.assert_close(2 * soft, hard, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_kd_taken_apart(temperature: float) -> None:
    student, teacher, target = torch.randn(1, 6), torch.randn(1, 6), torch.tensor([3])
    others = 1 - (teacher / temperature).softmax(1)[0, 3].item()
    whole = value_and_gradient(KD(temperature), student, teacher, None)
    parts = value_and_gradient(DKD(1.0, others, temperature), student, teacher, target)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@every_loss
@both
def test_order_of_the_batch_does_not_count(make: Make, standardize: bool) -> None:
    student, teacher, target = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = make(2.0, standardize=standardize)
    torch.testing.assert_close(
        loss(student[order], teacher[order], target[order]), loss(student, teacher, target), rtol=1e-5, atol=1e-6
    )


@every_loss
def test_teacher_gets_no_gradient_and_autocast_changes_nothing(make: Make) -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss, target = make(3.0), torch.tensor([0, 1, 2, 3])
    plain = loss(student, teacher, target)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(student, teacher, target)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
    mixed.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.autograd.grad(plain, student)[0], rtol=0, atol=0)


@every_loss
@both
def test_copied_shown_and_compiled(make: Make, standardize: bool) -> None:
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = make(3.0, standardize=standardize)
    expected = value_and_gradient(loss, student, teacher, target)
    assert f"standardize={standardize}" in repr(loss)
    again = eval(repr(loss), dict(vars(losses)))
    for other in (copy.deepcopy(loss), again):
        assert repr(other) == repr(loss)
        torch.testing.assert_close(value_and_gradient(other, student, teacher, target), expected, rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, student, teacher, target), expected)


@every_loss
def test_misfit_logits(make: Make) -> None:
    loss, target = make(2.0), torch.tensor([0, 1])
    name = type(loss).__name__
    with pytest.raises(ValueError, match=rf"{name} needs the same classes.* 3 from the student and 4 from the teacher"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), target)
    with pytest.raises(
        ValueError, match=rf"{name} compares logits \[N, C\], got student \(2, 3\) and .*\(2, 3, 1, 1\)"
    ):
        loss(torch.zeros(2, 3), torch.zeros(2, 3, 1, 1), target)
    with pytest.raises(ValueError, match=rf"{name} compares the same samples, got 2 .* 5"):
        loss(torch.zeros(2, 3), torch.zeros(5, 3), target)


@pytest.mark.parametrize("loss", [DKD(), NKD()], ids=repr)
def test_labels_that_are_needed(loss: DistillationLoss) -> None:
    logits, name = torch.zeros(2, 3), type(loss).__name__
    assert loss.needs_target
    with pytest.raises(ValueError, match=f"{name} needs the labels"):
        loss(logits, logits)
    for target in (torch.zeros(3).long(), torch.zeros(2, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match=rf"{name} needs class indices \[2\]"):
            loss(logits, logits, target)
    with pytest.raises(ValueError, match=f"{name} needs at least 2 classes"):
        loss(logits[:, :1], logits[:, :1], torch.zeros(2).long())


@pytest.mark.parametrize("loss", [KD(), LogitMSE(), DIST(), MLKD()], ids=repr)
def test_labels_that_are_not_needed(loss: DistillationLoss) -> None:
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    assert not loss.needs_target
    assert loss(student, teacher) == loss(student, teacher, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KD(temperature=-1), "`temperature` must be above 0, got -1"),
        (lambda: KD(temperature=0), "`temperature` must be above 0, got 0"),
        (lambda: KD(temperature=float("nan")), "`temperature` must be above 0, got nan"),
        (lambda: KD(temperature=float("inf")), "`temperature` must be above 0, got inf"),
        (lambda: KD(temperature="4"), "`temperature` must be above 0, got '4'"),
        (lambda: KD(temperature=True), "`temperature` must be above 0, got True"),
        (lambda: KD(standardize=1), "`standardize` must be true or false, got 1"),
        (lambda: LogitMSE(standardize="no"), "`standardize` must be true or false, got 'no'"),
        (lambda: DKD(alpha=-1), "`alpha` must be at least 0, got -1"),
        (lambda: DKD(beta=float("nan")), "`beta` must be at least 0, got nan"),
        (lambda: DKD(temperature=0), "`temperature` must be above 0"),
        (lambda: NKD(gamma=-0.5), "`gamma` must be at least 0, got -0.5"),
        (lambda: NKD(temperature=0), "`temperature` must be above 0"),
        (lambda: DIST(beta=-1), "`beta` must be at least 0"),
        (lambda: DIST(gamma=-1), "`gamma` must be at least 0"),
        (lambda: DIST(temperature=None), "`temperature` must be above 0, got None"),
        (lambda: MLKD(temperatures=[]), r"`temperatures` must be a list of numbers above 0, got \[\]"),
        (lambda: MLKD(temperatures=2.0), "`temperatures` must be a list of numbers above 0, got 2.0"),
        (lambda: MLKD(temperatures=[2.0, 0.0]), "`temperatures` must be above 0, got 0.0"),
        (lambda: MLKD(temperatures="24"), "`temperatures` must be above 0, got '2'"),
    ],
)
def test_options_out_of_range(make: Callable[[], DistillationLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_made_from_a_configuration() -> None:
    config = {"_target_": "lightning_compress.distill.losses.MLKD", "temperatures": [1, 2], "standardize": True}
    assert repr(instantiate(config)) == "MLKD(temperatures=(1.0, 2.0), standardize=True)"
