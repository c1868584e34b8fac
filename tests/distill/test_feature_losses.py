"""Losses between features: finite where norms and distances vanish, projectors, invariants, clear refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distill import losses
from lightning_compress.distill.losses import (
    AT,
    CRD,
    PKT,
    RKD,
    SP,
    BlockMSE,
    DistillationLoss,
    FitNet,
    ReviewKD,
    hierarchical_context,
)

LOSSES: dict[str, DistillationLoss] = {
    name: getattr(losses, name)() for name in ("AT", "BlockMSE", "CRD", "FitNet", "PKT", "RKD", "ReviewKD", "SP")
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
relational = pytest.mark.parametrize("loss", [SP(), RKD(), PKT(), CRD()], ids=repr)
Size = torch.Size


def features(loss: DistillationLoss, samples: int = 4) -> Tensor:
    """Random features of a shape that the loss takes without a projector."""
    return torch.randn(samples, 6) if isinstance(loss, CRD) else torch.randn(samples, 3, 5, 5)


def value_and_gradient(
    loss: DistillationLoss, student: Tensor, teacher: Tensor, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    sides: Any = ([student], [teacher]) if loss.joint else (student, teacher)
    value = loss(*sides, target)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_finite_where_norms_and_distances_vanish(loss: DistillationLoss, dtype: torch.dtype) -> None:
    varied = features(loss).to(dtype)
    zeros, constant = torch.zeros_like(varied), torch.full_like(varied, 0.3)
    twins, one_zero = (
        varied[[0, 0, 1, 1]],
        varied * torch.tensor([0, 1, 1, 1], dtype=dtype).view(-1, *[1] * (varied.dim() - 1)),
    )
    cases = [varied, zeros, constant, twins, one_zero, -varied, 30 * varied, varied / 1000]
    for student in cases:
        for teacher in (student, *cases[:5]):
            for samples in (4, 2, 1):
                value, gradient = value_and_gradient(loss, student[:samples], teacher[:samples])
                assert (value.shape, value.dtype, gradient.dtype) == ((), torch.float32, dtype)
                assert value.isfinite()
                assert gradient.isfinite().all()


def test_pkt_where_a_cosine_rounds_to_less_than_minus_one() -> None:
    for _ in range(200):
        one, teacher = torch.randn(1, 200), torch.randn(2, 200)
        value, gradient = value_and_gradient(PKT(), torch.cat([one, -one]), teacher)
        assert value.isfinite()
        assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_large_features_of_half_precision(loss: DistillationLoss, dtype: torch.dtype) -> None:
    student, teacher = (features(loss).clamp(-3, 3).mul(2e4).to(dtype) for _ in range(2))
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [FitNet(), AT(), SP(), RKD(), PKT(), ReviewKD(), BlockMSE()], ids=repr)
def test_zero_where_student_and_teacher_agree(loss: DistillationLoss) -> None:
    same, other = features(loss), features(loss)
    value, gradient = value_and_gradient(loss, same, same)
    assert value.abs() < 1e-6
    assert gradient.abs().max() < 1e-5
    assert value_and_gradient(loss, same, other)[0] > 1e-4


def test_crd_is_least_where_pairs_agree_and_all_others_are_apart() -> None:
    apart = torch.eye(5)
    best, gradient = value_and_gradient(CRD(), apart, apart)
    assert gradient.abs().max() < 1e-2
    for _ in range(20):
        assert value_and_gradient(CRD(), apart + 0.5 * torch.randn(5, 5), apart)[0] > best
    assert value_and_gradient(CRD(), apart.roll(1, 0), apart)[0] > best + 1


@relational
@pytest.mark.parametrize("target", [None, torch.tensor([0, 1, 1, 2, 0, 3])], ids=["unlabelled", "labelled"])
def test_relations_do_not_see_rotation_and_scale(loss: DistillationLoss, target: Tensor | None) -> None:
    student, teacher = torch.randn(6, 7).double(), torch.randn(6, 7).double()
    rotation = torch.linalg.qr(torch.randn(7, 7).double())[0]
    if isinstance(loss, CRD):  # both sides live in one space
        changed, unchanged = (3 * student @ rotation, 5 * teacher @ rotation), (student, teacher)
    else:
        changed, unchanged = (3 * student @ rotation, 5 * teacher), (student, teacher)
    torch.testing.assert_close(loss(*changed, target), loss(*unchanged, target))


@every_loss
def test_order_of_the_batch_does_not_count(loss: DistillationLoss) -> None:
    student, teacher, order = features(loss, 6), features(loss, 6), torch.tensor([3, 1, 5, 0, 2, 4])
    for target in (None, torch.tensor([0, 1, 1, 2, 0, 3])):
        value, gradient = value_and_gradient(loss, student, teacher, target)
        permuted = value_and_gradient(loss, student[order], teacher[order], None if target is None else target[order])
        torch.testing.assert_close(permuted, (value, gradient[order]), rtol=1e-4, atol=1e-6)


@every_loss
def test_teacher_gets_no_gradient_and_autocast_changes_nothing(loss: DistillationLoss) -> None:
    student, teacher = features(loss).requires_grad_(), features(loss).requires_grad_()
    made = loss.projector(*([s.shape] if loss.joint else s.shape for s in (student, teacher)))
    sides: Any = ([student], [teacher]) if loss.joint else (student, teacher)
    if made is not None:
        sides = made(*sides)
    plain = loss(*sides)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(*sides)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
    mixed.backward()
    assert teacher.grad is None
    assert student.grad is not None
    for name, parameter in made.named_parameters() if made is not None else ():
        assert parameter.grad is not None, name


@every_loss
def test_copied_and_shown(loss: DistillationLoss) -> None:
    student, teacher = features(loss), features(loss)
    again = eval(repr(loss), dict(vars(losses)))
    for other in (copy.deepcopy(loss), again):
        assert repr(other) == repr(loss)
        torch.testing.assert_close(
            value_and_gradient(other, student, teacher), value_and_gradient(loss, student, teacher), rtol=0, atol=0
        )


def test_options_are_shown() -> None:
    assert repr(RKD(distance_weight=1)) == "RKD(distance_weight=1.0, angle_weight=50.0)"
    assert repr(CRD(dim=16)) == "CRD(temperature=0.07, dim=16)"


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((4, 3), (4, 5), nn.Linear),
        ((4, 3, 9), (4, 5, 9), nn.Conv1d),
        ((4, 3, 8, 8), (4, 5, 4, 4), nn.Conv2d),
        ((4, 3, 4, 8), (4, 5, 8, 4), nn.Conv2d),
        ((4, 3, 2, 4, 4), (4, 5, 2, 2, 2), nn.Conv3d),
    ],
)
def test_fitnet_learns_a_layer_where_channels_differ(
    student: tuple[int, ...], teacher: tuple[int, ...], kind: type[nn.Module]
) -> None:
    loss = FitNet()
    made = loss.projector(Size(student), Size(teacher))
    assert isinstance(made, nn.Module)
    assert [type(layer) for layer in made.children()] == [kind]
    ours, theirs = torch.randn(student), torch.randn(teacher)
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    first = loss(*made(ours, theirs))
    for _ in range(5):
        optimizer.zero_grad()
        loss(*made(ours, theirs)).backward()
        optimizer.step()
    assert loss(*made(ours, theirs)) < first
    assert loss.projector(Size(teacher), Size(teacher)) is None


@pytest.mark.parametrize("loss", [FitNet(), AT()], ids=repr)
def test_the_larger_map_is_averaged(loss: DistillationLoss) -> None:
    small, large = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 8, 4)
    mean = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(loss(small, large), loss(small, mean))
    torch.testing.assert_close(loss(large, small), loss(mean, small))


def test_at_compares_other_channels() -> None:
    student = torch.randn(2, 3, 4, 4)
    assert AT()(student, student.repeat(1, 2, 1, 1)) < 1e-12


def test_crd_with_labels_leaves_out_its_own_class() -> None:
    student, teacher, target = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 0, 1, 1, 1, 2])
    loss = CRD()
    torch.testing.assert_close(loss(student, teacher, torch.arange(6)), loss(student, teacher))
    assert loss(student, teacher, target) < loss(student, teacher)
    assert value_and_gradient(loss, student, teacher, torch.zeros(6).long())[1].abs().max() == 0


def test_crd_learns_by_both_heads() -> None:
    loss = CRD(dim=8)
    heads = loss.projector(Size([16, 3, 4, 4]), Size([16, 5]))
    student, teacher = torch.randn(16, 3, 4, 4), torch.randn(16, 5)
    optimizer = torch.optim.Adam(heads.parameters(), 0.02)
    first = loss(*heads(student, teacher)).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(*heads(student, teacher)).backward()
        optimizer.step()
    assert loss(*heads(student, teacher)).item() < 0.6 * first


def test_reviewkd_fuses_from_the_deepest_layer() -> None:
    loss = ReviewKD()
    student = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4), torch.randn(2, 8)]
    teacher = [torch.randn(2, 6, 16, 16), torch.randn(2, 12, 4, 4), torch.randn(2, 12)]
    fusion = loss.projector([f.shape for f in student], [f.shape for f in teacher])
    for features in student:
        features.requires_grad_()
    outputs, targets = fusion(student, teacher)
    assert [f.shape for f in outputs] == [f.shape for f in targets]
    assert [tuple(f.shape) for f in outputs] == [(2, 6, 16, 16), (2, 12, 4, 4), (2, 12, 1, 1)]
    # The deepest comes from itself alone, the shallowest from all.
    reached = [
        [g is not None for g in torch.autograd.grad(f.sum(), student, retain_graph=True, allow_unused=True)]
        for f in outputs
    ]
    assert reached == [[True, True, True], [False, True, True], [False, False, True]]
    optimizer = torch.optim.Adam(fusion.parameters(), 0.01)
    first = loss(outputs, targets).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(*fusion([f.detach() for f in student], teacher)).backward()
        optimizer.step()
    assert loss(*fusion(student, teacher)).item() < 0.9 * first


def test_projectors_run_under_autocast() -> None:
    student, teacher = torch.randn(3, 4, 4, 4), torch.randn(3, 6, 4, 4)
    for loss in (FitNet(), CRD(dim=8), ReviewKD()):
        sides: Any = ([student], [teacher]) if loss.joint else (student, teacher)
        shapes = ([student.shape], [teacher.shape]) if loss.joint else (student.shape, teacher.shape)
        made = loss.projector(*shapes)
        assert made is not None
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*made(*sides))
        assert value.dtype == torch.float32
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("loss", [AT(), SP(), RKD(), PKT(), BlockMSE()], ids=repr)
def test_no_projector(loss: DistillationLoss) -> None:
    assert loss.projector(Size([2, 3, 4, 4]), Size([2, 3, 4, 4])) is None


@pytest.mark.parametrize("loss", [FitNet(), AT(), SP(), RKD(), PKT()], ids=repr)
def test_misfit_features(loss: DistillationLoss) -> None:
    name = type(loss).__name__
    with pytest.raises(ValueError, match=rf"{name} compares features .*student \(2, 3\) and teacher \(2, 3, 4, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=rf"{name} compares the same samples, got 2 .* 5"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 4, 4))


def test_misfit_shapes_by_name() -> None:
    with pytest.raises(ValueError, match=r"AT compares features \[N, C, H, W\].*student \(2, 3\)"):
        AT()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"FitNet needs features of one shape.*\(2, 3, 4, 4\).*\(2, 5, 4, 4\)"):
        FitNet()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"no projector can join student \(2, 3\) and teacher \(2, 5, 4, 4\)"):
        FitNet().projector(Size([2, 3]), Size([2, 5, 4, 4]))
    with pytest.raises(ValueError, match=r"1 to 3 spatial dims"):
        FitNet()(torch.zeros(2, 3, 2, 2, 2, 2), torch.zeros(2, 3, 1, 1, 1, 1))
    for shapes in [((2, 3, 4, 4), (2, 5, 4, 4)), ((2, 3), (2, 3, 4, 4)), ((2, 3), (3, 3))]:
        message = "BlockMSE needs features of one shape.*take FitNet"
        with pytest.raises(ValueError, match=message):
            BlockMSE()(*map(torch.zeros, shapes))
        with pytest.raises(ValueError, match=message):
            BlockMSE().projector(*map(Size, shapes))
    with pytest.raises(ValueError, match=r"CRD compares embeddings .*\(2, 3, 4, 4\)"):
        CRD()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"CRD needs features of one shape, got student \(2, 3\) and teacher \(2, 4\)"):
        CRD()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"CRD compares the same samples"):
        CRD()(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"CRD needs class indices \[2\]"):
        CRD()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"CRD makes embeddings of features"):
        CRD().projector(Size([2]), Size([2, 3]))


def test_misfit_layers_of_reviewkd() -> None:
    loss, one = ReviewKD(), torch.zeros(2, 3, 4, 4)
    for sides in ((one, one), ([], []), ([one], one)):
        with pytest.raises(ValueError, match="takes lists of features"):
            loss(*sides)
    with pytest.raises(ValueError, match="in pairs, got 2 of the student and 1 of the teacher"):
        loss([one, one], [one])
    with pytest.raises(ValueError, match="in pairs, got 1 of the student and 2 of the teacher"):
        loss.projector([one.shape], [one.shape] * 2)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) among student"):
        loss.projector([one.shape, Size([2, 3, 4])], [one.shape] * 2)
    with pytest.raises(ValueError, match=r"one shape, got student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\)"):
        loss([one], [torch.zeros(2, 5, 4, 4)])
    with pytest.raises(ValueError, match=r"feature maps \[N, C, H, W\], got \(2, 3\)"):
        hierarchical_context(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RKD(distance_weight=-1), "`distance_weight` must be at least 0, got -1"),
        (lambda: RKD(angle_weight=float("inf")), "`angle_weight` must be at least 0, got inf"),
        (lambda: CRD(temperature=0), "`temperature` must be above 0, got 0"),
        (lambda: CRD(dim=0), "`dim` must be a whole number above 0, got 0"),
        (lambda: CRD(dim=8.0), "`dim` must be a whole number above 0, got 8.0"),
    ],
)
def test_options_out_of_range(make: Callable[[], DistillationLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
