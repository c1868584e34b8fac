"""The sides of the distillation benchmark: what each gives to the same `Distillation` callback.

Hyperparameters are those that the papers or their reference code have for small images, the same for ours and a peer's
where the loss is the same: KD with T = 4, weights 0.1 (labels) and 0.9 (teacher), as Tian et al. 2020 (RepDistiller)
have it; standardised logits with T = 2, weights 0.1 and 9 (Sun et al. 2024); DKD with alpha = 1, beta = 2 for residual
pairs and 6 for VGG to MobileNetV2, T = 4 (Zhao et al. 2022), without their warm-up of the loss; DIST with T = 4 and
weight 2 for both parts (Huang et al. 2022); FitNet with weight 100 on the middle stage (RepDistiller; 10 in the short
form), beside KD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from lightning_compress.distill import Term
from lightning_compress.distill.losses import DIST, DKD, KD, FitNet
from lightning_compress.zoo.feedforward import MobileNetV2Small, VGGSmall, resnet20, resnet56

__all__ = [
    "ALONE",
    "KD_TASK",
    "KD_TEMPERATURE",
    "KD_WEIGHT",
    "PAIRS",
    "PLAIN",
    "SIDES",
    "USUAL",
    "Pair",
    "Side",
    "missing_peers",
]

KD_TEMPERATURE, KD_TASK, KD_WEIGHT = 4.0, 0.1, 0.9
STANDARDIZED_TEMPERATURE, STANDARDIZED_TASK, STANDARDIZED_WEIGHT = 2.0, 0.1, 9.0
DIST_TEMPERATURE, DIST_WEIGHT = 4.0, 2.0
DKD_TEMPERATURE, DKD_ALPHA = 4.0, 1.0


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        title: how the table calls them.
        teacher: builds it as `teacher(in_channels, num_classes, width=...)`.
        student: likewise.
        dkd_beta: DKD's weight of the classes other than the label's, for such a pair.
        hint: layers of student and teacher that FitNet compares: half the image's side on both.
        hint_weight: of that term.
    """

    title: str
    teacher: Callable[..., nn.Module]
    student: Callable[..., nn.Module]
    dkd_beta: float
    hint: tuple[str, str]
    hint_weight: float = 100.0


PAIRS = {
    "resnet": Pair("ResNet-56 → ResNet-20", resnet56, resnet20, 2.0, ("layer2", "layer2")),
    "mobilenet": Pair("VGG → MobileNetV2-small", VGGSmall, MobileNetV2Small, 6.0, ("features.7", "features.8")),
}


@dataclass(frozen=True)
class Side:
    """One way to teach.

    Attributes:
        options: what `Distillation` is given for a pair, besides the teacher: `losses` and `task_weight`. None: no
            teacher.
        layers: whether it looks inside the networks, so that outputs kept of the teacher are not enough.
        peer: the package whose loss it is; None: ours.
        asked: run only where it is asked for by name.
    """

    options: Callable[[Pair], dict[str, Any]] | None
    layers: bool = False
    peer: str | None = None
    asked: bool = False


class TorchdistillLoss(nn.Module):
    """A loss of torchdistill in our protocol: it finds logits under a module's path, "." being the whole network."""

    needs_target = True

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        path = dict.fromkeys(("student_module_path", "teacher_module_path"), ".")
        kind = dict.fromkeys(("student_module_io", "teacher_module_io"), "output")
        self.loss = getattr(import_module("torchdistill.losses.mid_level"), name)(**path, **kind, **options)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits [N, classes]."""
        loss: Tensor = self.loss({".": {"output": student}}, {".": {"output": teacher}}, target)
        return loss


class FasteraiLoss(nn.Module):
    """A loss function of fasterai in our protocol; the module that holds it needs torch only."""

    needs_target = True

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits [N, classes]."""
        function = getattr(import_module("fasterai.distill.losses"), self.name)
        loss: Tensor = function(student, teacher, target=target, **self.options)
        return loss


def _kd(_: Pair) -> dict[str, Any]:
    return {"losses": {"kd": Term(KD(temperature=KD_TEMPERATURE), KD_WEIGHT)}, "task_weight": KD_TASK}


def _standardized(_: Pair) -> dict[str, Any]:
    loss = KD(temperature=STANDARDIZED_TEMPERATURE, standardize=True)
    return {"losses": {"kd": Term(loss, STANDARDIZED_WEIGHT)}, "task_weight": STANDARDIZED_TASK}


def _dkd(pair: Pair) -> dict[str, Any]:
    return {"losses": {"dkd": DKD(alpha=DKD_ALPHA, beta=pair.dkd_beta, temperature=DKD_TEMPERATURE)}}


def _dist(_: Pair) -> dict[str, Any]:
    return {"losses": {"dist": DIST(beta=DIST_WEIGHT, gamma=DIST_WEIGHT, temperature=DIST_TEMPERATURE)}}


def _fitnet(pair: Pair) -> dict[str, Any]:
    plain = _kd(pair)
    hint = Term(FitNet(), pair.hint_weight, student=pair.hint[0], teacher=pair.hint[1])
    return {**plain, "losses": {**plain["losses"], "hint": hint}}


def _torchdistill_kd(_: Pair) -> dict[str, Any]:
    loss = TorchdistillLoss("KDLoss", temperature=KD_TEMPERATURE, alpha=KD_TASK, beta=KD_WEIGHT)
    return {"losses": {"kd": loss}, "task_weight": 0.0}  # alpha is its own cross-entropy


def _torchdistill_standardized(_: Pair) -> dict[str, Any]:
    loss = TorchdistillLoss(
        "LogitStdKDLoss", temperature=STANDARDIZED_TEMPERATURE, alpha=STANDARDIZED_TASK, beta=STANDARDIZED_WEIGHT
    )
    return {"losses": {"kd": loss}, "task_weight": 0.0}


def _torchdistill_dist(_: Pair) -> dict[str, Any]:
    loss = TorchdistillLoss("DISTLoss", beta=DIST_WEIGHT, gamma=DIST_WEIGHT, tau=DIST_TEMPERATURE)
    return {"losses": {"dist": loss}}


def _fasterai_kd(_: Pair) -> dict[str, Any]:
    loss = FasteraiLoss("SoftTarget", T=KD_TEMPERATURE)
    return {"losses": {"kd": Term(loss, KD_WEIGHT)}, "task_weight": KD_TASK}


def _fasterai_dkd(pair: Pair) -> dict[str, Any]:
    return {"losses": {"dkd": FasteraiLoss("DecoupledKD", T=DKD_TEMPERATURE, alpha=DKD_ALPHA, beta=pair.dkd_beta)}}


ALONE, PLAIN = "student alone", "KD"
SIDES = {
    ALONE: Side(None),
    PLAIN: Side(_kd),
    "KD, standardised logits": Side(_standardized),
    "DKD": Side(_dkd),
    "DIST": Side(_dist),
    "FitNet + KD": Side(_fitnet, layers=True),
    "torchdistill KDLoss": Side(_torchdistill_kd, peer="torchdistill"),
    "torchdistill LogitStdKDLoss": Side(_torchdistill_standardized, peer="torchdistill", asked=True),
    "torchdistill DISTLoss": Side(_torchdistill_dist, peer="torchdistill", asked=True),
    "fasterai SoftTarget": Side(_fasterai_kd, peer="fasterai"),
    "fasterai DecoupledKD": Side(_fasterai_dkd, peer="fasterai", asked=True),
}
USUAL = [name for name, side in SIDES.items() if not side.asked]


def missing_peers() -> list[str]:
    """Peers that are not installed."""
    peers = dict.fromkeys(side.peer for side in SIDES.values() if side.peer)
    return [peer for peer in peers if find_spec(peer) is None]
