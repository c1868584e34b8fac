"""The pruned network equals the masked one, on architectures of timm, by the outside oracle."""

from __future__ import annotations

import pytest

from benchmarks.architectures import ARCHITECTURES, by_kind
from tests.halving import check_halving

SAMPLE = ("resnet18", "mobilenetv3_small_100", "ghostnet_100", "shufflenet_v2_x1_0")
SLOW = (
    *("densenet121", "efficientnet_b0", "regnetx_002", "regnety_002", "dla34", "res2net50_14w_8s", "skresnet18"),
    *("resnest14d", "hrnet_w18_small", "seresnet18", "mixnet_s", "rexnet_100", "repvgg_a0", "hardcorenas_a"),
    *("tinynet_a", "dpn48b"),
)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, id=n) for n in SAMPLE), *(pytest.param(n, id=n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_public_architectures(name: str) -> None:
    pytest.importorskip("timm", reason='needs the extra "vision"')
    architecture = next(item for item in ARCHITECTURES if item.name == name)
    check_halving(architecture.build(), architecture.example())


def test_there_are_twenty() -> None:
    names = {item.name for item in by_kind("cnn")}
    assert len({*SAMPLE, *SLOW}) == 20
    assert {*SAMPLE, *SLOW} <= names
