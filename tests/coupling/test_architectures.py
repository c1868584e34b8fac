"""The pruned network equals the masked one, on the zoo and on architectures of timm, by the outside oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import ARCHITECTURES, by_kind
from benchmarks.oracle import judge
from lightning_compress.methods.pruning import prune_channels
from lightning_compress.zoo import feedforward
from tests.networks import randomize

ZOO = ("LeNet5", "LeNet300100", "VGGSmall", "resnet20", "resnet56", "MobileNetV2Small")
SAMPLE = ("resnet18", "mobilenetv3_small_100", "ghostnet_100", "shufflenet_v2_x1_0")
SLOW = (
    *("densenet121", "efficientnet_b0", "regnetx_002", "regnety_002", "dla34", "res2net50_14w_8s", "skresnet18"),
    *("resnest14d", "hrnet_w18_small", "seresnet18", "mixnet_s", "rexnet_100", "repvgg_a0", "hardcorenas_a"),
    *("tinynet_a", "dpn48b"),
)


def check(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Half of every layer goes; what is left must be what the zeroed original computes, exactly."""
    randomize(model, 0)
    dense = copy.deepcopy(model)
    pruned = prune_channels(model, inputs, ratio=0.5, ranking="layer")
    kept = {
        name: {dim: torch.tensor(indices) for dim, indices in dims.items()}
        for edit in pruned.edits
        for name, dims in edit.slices.items()
    }
    before, after = pruned.costs["macs"]
    assert after < 0.5 * before
    verdict = judge(dense, model, kept, inputs)
    assert verdict.kind == "exact", verdict


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    size = 28 if name.startswith("LeNet") else 16
    options = {"image_size": size} if name.startswith("LeNet") else {}
    model = getattr(feedforward, name)(in_channels=1, num_classes=10, **options)
    check(model.eval(), (torch.randn(2, 1, size, size),))


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, id=n) for n in SAMPLE), *(pytest.param(n, id=n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_public_architectures(name: str) -> None:
    pytest.importorskip("timm", reason='needs the extra "vision"')
    architecture = next(item for item in ARCHITECTURES if item.name == name)
    check(architecture.build(), architecture.example())


def test_there_are_twenty() -> None:
    names = {item.name for item in by_kind("cnn")}
    assert len({*SAMPLE, *SLOW}) == 20
    assert {*SAMPLE, *SLOW} <= names
