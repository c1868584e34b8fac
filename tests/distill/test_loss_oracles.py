"""Losses against torchdistill's, and against the papers' formulas written out in loops: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distill.losses import (
    AT,
    CRD,
    DIST,
    DKD,
    KD,
    MLKD,
    NKD,
    PKT,
    RKD,
    SP,
    FitNet,
    ReviewKD,
    hierarchical_context,
)

Loss = Callable[..., Any]
LABELS = torch.tensor([0, 3, 1, 1, 4, 0])


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def check_same(ours: Loss, reference: Loss, student: Tensor, teacher: Tensor, *rest: Any) -> None:
    """Ours, in float64 and in float32, has the value and the gradient of the reference in float64, to 1e-5."""
    results = []
    for loss in (ours, reference):
        x = student.double().requires_grad_()
        value = loss(x, teacher.double(), *rest)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (value, gradient), (expected, wanted) = results
    assert expected.isfinite()
    assert wanted.abs().max() > 0
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    x = student.float().requires_grad_()
    single = ours(x, teacher.float(), *rest)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(single, x)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


# torchdistill takes the outputs of both networks as dictionaries: name of a module -> what went in and came out.
NAMES = {
    "student_module_path": "m",
    "student_module_io": "output",
    "teacher_module_path": "m",
    "teacher_module_io": "output",
}
PATHS = {"student_output_path": "m", "teacher_output_path": "m"}


def theirs(name: str, **options: Any) -> Loss:
    module = pytest.importorskip("torchdistill.losses.mid_level", reason='needs the extra "dev"')
    criterion = getattr(module, name)(**options)
    return lambda student, teacher, *_: criterion({"m": {"output": student}}, {"m": {"output": teacher}})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_of_torchdistill(temperature: float) -> None:
    other = theirs("KDLoss", temperature=temperature, alpha=0.0, **NAMES)
    student, teacher = pair(6, 5)
    check_same(KD(temperature), lambda s, t: temperature**2 * other(s, t), student, teacher)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardized_kd_of_torchdistill(temperature: float) -> None:
    other = theirs("LogitStdKDLoss", temperature=temperature, alpha=0.0, eps=1e-7, **NAMES)
    student, teacher = pair(6, 5)
    check_same(KD(temperature, standardize=True), lambda s, t: temperature**2 * other(s, t), 3 * student, teacher + 1)


@pytest.mark.parametrize("options", [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_dist_of_torchdistill(options: tuple[float, float, float]) -> None:
    beta, gamma, temperature = options
    check_same(DIST(*options), theirs("DISTLoss", beta=beta, gamma=gamma, tau=temperature, **NAMES), *pair(6, 5))


def test_at_of_torchdistill() -> None:
    pairs = {"p": {"student": {"io": "output", "path": "m"}, "teacher": {"io": "output", "path": "m"}}}
    check_same(AT(), theirs("ATLoss", at_pairs=pairs, mode="code"), torch.randn(6, 3, 4, 4), torch.randn(6, 5, 4, 4))


# Not SP: torchdistill 1.1.5 divides the rows by their sums of absolute values, the paper by their L2 norms.


@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_rkd_of_torchdistill(weights: tuple[float, float]) -> None:
    other = theirs("RKDLoss", dist_factor=weights[0], angle_factor=weights[1], reduction="mean", **PATHS)
    check_same(RKD(*weights), other, torch.randn(6, 7), torch.randn(6, 9))


def test_pkt_of_torchdistill() -> None:
    # Features of one side of the space have cosines around one half, as after a ReLU.
    check_same(PKT(), theirs("PKTLoss", **NAMES), torch.randn(6, 7).relu(), torch.randn(6, 9).relu())


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (2, 2), (1, 1)])
def test_hierarchical_context_of_torchdistill(size: tuple[int, int]) -> None:
    other = theirs("HierarchicalContextLoss", **NAMES)
    check_same(hierarchical_context, lambda s, t: other((s, None), t), *pair(3, 4, *size))


def test_crd_of_torchdistill_with_the_batch_as_its_memory() -> None:
    module = pytest.importorskip("torchdistill.losses.mid_level", reason='needs the extra "dev"')
    samples, dim = 6, 8
    student, teacher = (F.normalize(side.double()) for side in pair(samples, dim))
    other = module.CRDLoss("m", "empty", "m", dim, samples, samples - 1, samples, temperature=0.1).double()
    other.memory_v1.copy_(student)
    other.memory_v2.copy_(teacher)
    each = torch.arange(samples)
    contrast = torch.stack([torch.cat([each[i : i + 1], each[:i], each[i + 1 :]]) for i in range(samples)])
    batch = {"m": {"output": student}, "empty": {"input": {"pos_idx": each, "contrast_idx": contrast}}}
    expected = other(batch, {"m": {"output": teacher}}).squeeze()
    torch.testing.assert_close(CRD(temperature=0.1)(student, teacher), expected, rtol=1e-5, atol=0)


# The papers' formulas, one number at a time.


def softmax(row: Sequence[Any], temperature: float = 1.0) -> list[Any]:
    powers = [(x / temperature).exp() for x in row]
    return [x / sum(powers) for x in powers]


def kl(teacher: Sequence[Any], student: Sequence[Any]) -> Any:
    return sum(q * (q / p).log() for q, p in zip(teacher, student, strict=True))


def kd_loops(student: Tensor, teacher: Tensor, temperature: float) -> Any:
    rows = [kl(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * sum(rows) / len(rows)


def test_kd_in_loops() -> None:
    check_same(KD(3.0), lambda s, t: kd_loops(s, t, 3.0), *pair(6, 5))


def test_standardized_kd_in_loops() -> None:
    def scores(rows: Tensor) -> Tensor:
        made = []
        for row in rows:
            mean = sum(row) / len(row)
            deviation = (sum((x - mean) ** 2 for x in row) / (len(row) - 1)) ** 0.5
            made.append(torch.stack([(x - mean) / (1e-7 + deviation) for x in row]))
        return torch.stack(made)

    check_same(KD(2.0, standardize=True), lambda s, t: kd_loops(scores(s), scores(t), 2.0), *pair(6, 5))


def test_dkd_in_loops() -> None:
    def loops(student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        total = 0.0
        for s, t, y in zip(student, teacher, target.tolist(), strict=True):
            p, q = softmax(s, 2.0), softmax(t, 2.0)
            others = [i for i in range(len(p)) if i != y]
            rest_p, rest_q = sum(p[i] for i in others), sum(q[i] for i in others)
            tckd = kl([q[y], rest_q], [p[y], rest_p])
            nckd = kl([q[i] / rest_q for i in others], [p[i] / rest_p for i in others])
            total = total + 4.0 * (1.5 * tckd + 3.0 * nckd)
        return total / len(student)

    check_same(DKD(alpha=1.5, beta=3.0, temperature=2.0), loops, *pair(6, 5), LABELS)


def test_nkd_in_loops() -> None:
    def loops(student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        total = 0.0
        for s, t, y in zip(student, teacher, target.tolist(), strict=True):
            others = [i for i in range(len(s)) if i != y]
            p, q = softmax([s[i] for i in others], 2.0), softmax([t[i] for i in others], 2.0)
            total = total - softmax(t)[y] * softmax(s)[y].log()
            total = total - 1.5 * 4.0 * sum(b * a.log() for a, b in zip(p, q, strict=True))
        return total / len(student)

    check_same(NKD(gamma=1.5, temperature=2.0), loops, *pair(6, 5), LABELS)


def test_dist_in_loops() -> None:
    def pearson(a: Sequence[Any], b: Sequence[Any]) -> Any:
        a, b = [x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b]
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / (sum(x**2 for x in a) * sum(y**2 for y in b)) ** 0.5

    def loops(student: Tensor, teacher: Tensor) -> Any:
        p, q = [softmax(s, 2.0) for s in student], [softmax(t, 2.0) for t in teacher]
        inter = [1 - pearson(a, b) for a, b in zip(p, q, strict=True)]
        intra = [1 - pearson([a[i] for a in p], [b[i] for b in q]) for i in range(student.shape[1])]
        return 4.0 * (1.5 * sum(inter) / len(inter) + 0.5 * sum(intra) / len(intra))

    check_same(DIST(beta=1.5, gamma=0.5, temperature=2.0), loops, *pair(6, 5))


def test_mlkd_in_loops() -> None:
    def loops(student: Tensor, teacher: Tensor) -> Any:
        samples, classes = student.shape
        total: Any = 0.0
        for temperature in (2.0, 5.0):
            p, q = ([softmax(row, temperature) for row in side] for side in (student, teacher))
            total = total + kd_loops(student, teacher, temperature)
            for i in range(samples):
                for j in range(samples):
                    ours, others = (sum(x * y for x, y in zip(m[i], m[j], strict=True)) for m in (p, q))
                    total = total + (ours - others) ** 2 / samples
            for i in range(classes):
                for j in range(classes):
                    ours, others = (sum(row[i] * row[j] for row in m) for m in (p, q))
                    total = total + (ours - others) ** 2 / classes
        return total

    check_same(MLKD([2.0, 5.0]), loops, *pair(4, 3))


def test_fitnet_in_loops() -> None:
    def loops(student: Tensor, teacher: Tensor) -> Any:
        n, c, h, w = student.shape
        total: Any = 0.0
        for i in range(n):
            for j in range(c):
                for y in range(h):
                    for x in range(w):
                        mean = sum(teacher[i, j, 2 * y + a, 2 * x + b] for a in (0, 1) for b in (0, 1)) / 4
                        total = total + (student[i, j, y, x] - mean) ** 2
        return total / student.numel()

    check_same(FitNet(), loops, torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4))


def test_at_in_loops() -> None:
    def attention(features: Tensor) -> list[Any]:
        c, h, w = features.shape
        places = [sum(features[i, y, x] ** 2 for i in range(c)) / c for y in range(h) for x in range(w)]
        norm = sum(p**2 for p in places) ** 0.5
        return [p / norm for p in places]

    def loops(student: Tensor, teacher: Tensor) -> Any:
        total, count = 0.0, 0
        for s, t in zip(student, teacher, strict=True):
            for a, b in zip(attention(s), attention(t), strict=True):
                total, count = total + (a - b) ** 2, count + 1
        return total / count

    check_same(AT(), loops, torch.randn(3, 2, 3, 2), torch.randn(3, 4, 3, 2))


def test_sp_in_loops() -> None:
    def similarity(rows: Tensor) -> list[list[Any]]:
        made = []
        for a in rows.flatten(1):
            products = [(a * b).sum() for b in rows.flatten(1)]
            made.append([x / sum(y**2 for y in products) ** 0.5 for x in products])
        return made

    def loops(student: Tensor, teacher: Tensor) -> Any:
        n, ours, others = len(student), similarity(student), similarity(teacher)
        return sum((ours[i][j] - others[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2

    check_same(SP(), loops, torch.randn(5, 2, 3, 3), torch.randn(5, 4, 2, 2))


def test_rkd_in_loops() -> None:
    def huber(x: Any) -> Any:
        return 0.5 * x**2 if x.abs() < 1 else x.abs() - 0.5

    def distances(rows: Tensor) -> dict[tuple[int, int], Any]:
        n = len(rows)
        made = {(i, j): (rows[i] - rows[j]).norm() for i in range(n) for j in range(n) if i != j}
        mean = sum(made.values()) / len(made)
        return {key: value / mean for key, value in made.items()}

    def cosine(rows: Tensor, i: int, j: int, k: int) -> Any:
        a, b = rows[j] - rows[i], rows[k] - rows[i]
        return (a * b).sum() / (a.norm() * b.norm())

    def loops(student: Tensor, teacher: Tensor) -> Any:
        n, ours, others = len(student), distances(student), distances(teacher)
        total = 2.0 * sum(huber(ours[key] - others[key]) for key in ours) / n**2
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    if i not in (j, k):
                        difference = cosine(student, i, j, k) - cosine(teacher, i, j, k)
                        total = total + 3.0 * huber(difference) / n**3
        return total

    check_same(RKD(2.0, 3.0), loops, torch.randn(5, 4), 3 * torch.randn(5, 6))


def test_pkt_in_loops() -> None:
    def affinities(rows: Tensor) -> list[list[Any]]:
        made = []
        for a in rows:
            cosines = [((a * b).sum() / (a.norm() * b.norm()) + 1) / 2 for b in rows]
            made.append([c / sum(cosines) for c in cosines])
        return made

    def loops(student: Tensor, teacher: Tensor) -> Any:
        n, ours, others = len(student), affinities(student), affinities(teacher)
        terms = [others[i][j] * ((others[i][j] + 1e-7) / (ours[i][j] + 1e-7)).log() for i in range(n) for j in range(n)]
        return sum(terms) / n**2

    check_same(PKT(), loops, torch.randn(5, 4), torch.randn(5, 6))


@pytest.mark.parametrize("target", [None, LABELS, torch.tensor([0, 1, 1, 1, 1, 1])], ids=["none", "some", "few"])
def test_crd_in_loops(target: Tensor | None) -> None:
    labels = list(range(6)) if target is None else target.tolist()

    def loops(student: Tensor, teacher: Tensor, _: Tensor | None) -> Any:
        n, temperature = len(student), 0.2
        score = {
            (i, j): ((student[i] * teacher[j]).sum() / (student[i].norm() * teacher[j].norm()) / temperature).exp()
            for i in range(n)
            for j in range(n)
            if i == j or labels[i] != labels[j]
        }
        scale = sum(x.item() for x in score.values()) / len(score)
        total = 0.0
        for i in range(n):
            others = [j for j in range(n) if labels[j] != labels[i]]
            for anchor in ("student", "teacher"):
                ratios = {j: score[(i, j) if anchor == "student" else (j, i)] / scale for j in [i, *others]}
                total = total - (ratios[i] / (ratios[i] + len(others))).log()
                for j in others:
                    total = total - (len(others) / (ratios[j] + len(others))).log()
        return total / n

    check_same(CRD(temperature=0.2), loops, *pair(6, 5), target)


def test_crd_of_two_by_hand() -> None:
    # Cosines 1 and 0 at temperature 1: e and 1, mean (e + 1) / 2, one negative for each.
    scale = (math.e + 1) / 2
    expected = 2 * (math.log(1 + scale / math.e) + math.log(1 + 1 / scale))
    assert CRD(temperature=1.0)(torch.eye(2), torch.eye(2)).item() == pytest.approx(expected, rel=1e-6)


def test_reviewkd_in_loops() -> None:
    def squared(a: Tensor, b: Tensor) -> Any:
        return sum((x - y) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / a.numel()

    def averaged(features: Tensor, side: int) -> Tensor:
        step = features.shape[-1] // side
        rows = [
            [features[:, :, y * step : (y + 1) * step, x * step : (x + 1) * step].mean((2, 3)) for x in range(side)]
            for y in range(side)
        ]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def loops(student: Tensor, teacher: Tensor) -> Any:
        small = squared(averaged(student, 1), averaged(teacher, 1))
        middle = squared(averaged(student, 2), averaged(teacher, 2))
        large = squared(averaged(student, 4), averaged(teacher, 4))
        # Maps of 8x8 with all three grids below them, and the same averaged to 2x2, with one.
        whole = (squared(student, teacher) + large / 2 + middle / 4 + small / 8) / 1.875
        return whole + (middle + small / 2) / 1.5

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return ReviewKD()([student, F.avg_pool2d(student, 4)], [teacher, F.avg_pool2d(teacher, 4)])

    check_same(ours, loops, *pair(2, 2, 8, 8))


def test_reviewkd_fusion_step_by_step() -> None:
    student, teacher = (
        [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)],
        [torch.randn(3, 5, 16, 16), torch.randn(3, 7, 4, 4)],
    )
    fusion = ReviewKD().projector([f.shape for f in student], [f.shape for f in teacher]).eval()
    outputs, _ = fusion(student, teacher)
    shallow, deep = fusion.blocks
    carried = deep.reduce(student[1])
    torch.testing.assert_close(outputs[1], deep.expand(carried))
    own = shallow.reduce(student[0])
    wide = carried.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = torch.cat([own, wide], 1)
    weights = (shallow.attention[0](weights)).sigmoid()
    mixed = own * weights[:, :1] + wide * weights[:, 1:]
    torch.testing.assert_close(outputs[0], shallow.expand(mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)))
