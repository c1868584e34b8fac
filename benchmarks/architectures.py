"""The architectures of the coverage benchmark: one or more of each family of timm and torchvision,
of the smallest depth and, where there are several, of the width that papers report.

Inputs are small where the architecture allows it: what is tried is the wiring, which does not depend on resolution.
Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Architecture", "by_kind"]

CLASSES = 1000


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: as timm, torchvision.models or torchvision.models.segmentation has it.
        source: `timm`, `torchvision` or `segmentation`.
        size: height and width of the input.
        kind: `cnn`; `mixed` where attention or token mixing stands beside convolutions.
        quick: whether it is among the few that `--quick` tries.
    """

    name: str
    source: str
    size: int = 64
    kind: str = "cnn"
    quick: bool = False

    @property
    def case(self) -> str:
        """A name that is unique in the benchmark."""
        return self.name if self.source == "timm" else f"{self.source}/{self.name}"

    def build(self) -> nn.Module:
        """The network, in eval mode, with random weights."""
        if self.source == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False).eval()
        import torchvision

        with warnings.catch_warnings():  # about the initialisation of GoogLeNet and Inception
            warnings.simplefilter("ignore", FutureWarning)
            if self.source == "segmentation":
                make = getattr(torchvision.models.segmentation, self.name)
                return make(weights=None, weights_backbone=None, num_classes=21).eval()
            return getattr(torchvision.models, self.name)(weights=None).eval()

    def counted(self, model: nn.Module) -> tuple[Tensor, ...]:
        """One image of the size that the architecture was made for, without memory: what its MACs are counted on."""
        size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
        return (torch.empty(1, *size, device="meta"),)

    def heads(self, model: nn.Module) -> list[nn.Module]:
        """The layers that Torch-Pruning must be told to leave: those that give the class scores."""
        classes = 21 if self.source == "segmentation" else CLASSES
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [m for m in layers if (m.out_features if isinstance(m, nn.Linear) else m.out_channels) == classes]

    def example(self, seed: int = 0, size: int | None = None) -> tuple[Tensor, ...]:
        """Two images of noise."""
        size = self.size if size is None else max(size, self.size)
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed)),)


QUICK = """
    resnet18 seresnet18 densenet121 mobilenetv2_100 mobilenetv3_small_100 efficientnet_b0 regnetx_002 ghostnet_100
    convnext_atto repvgg_a0 dla34 nf_resnet26 skresnet18 ese_vovnet19b_slim shufflenet_v2_x1_0
"""

# `name@size` where 64 pixels are too few for the architecture, or for what of it runs in training only.
TIMM = """
    resnet18 resnet26t resnext26ts wide_resnet50_2 seresnet18 legacy_seresnext26_32x4d ecaresnet26t gcresnext26ts
    skresnet18 resnest14d res2net50_14w_8s res2next50 resnetblur50 resnetaa34d resnetrs50 resnetv2_18 resnetv2_50d_gn
    resnetv2_50x1_bit densenet121 densenetblur121d rdnet_tiny dpn48b dla34 dla46x_c dla60_res2net hrnet_w18_small
    vgg11 inception_v4@96 inception_resnet_v2@96 legacy_xception xception41 nasnetalarge pnasnet5large
    mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_100 semnasnet_100
    spnasnet_100 fbnetc_100 fbnetv3_b efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnetv2_rw_t
    efficientnet_b0_gn mixnet_s tinynet_a rexnet_100 lcnet_100 lcnetv2_small hardcorenas_a
    ghostnet_100 ghostnetv2_100 ghostnetv3_100 regnetx_002 regnety_002 regnetz_005 regnetv_040
    nf_regnet_b0 nf_resnet26 eca_nfnet_l0 dm_nfnet_f0 convnext_atto convnextv2_atto convmixer_768_32
    inception_next_atto mambaout_femto repvgg_a0 repghostnet_100 mobileone_s0 repvit_m0_9 gernet_s
    selecsls42 vovnet39a ese_vovnet19b_slim ese_vovnet19b_dw cs3darknet_focus_s cspresnet50 cspresnext50 cspdarknet53
    cspnext_tiny darknet53 tresnet_m hgnet_tiny hgnetv2_b0 fasternet_t0 fastvit_t8 starnet_s1
"""
TORCHVISION = """
    alexnet vgg11_bn squeezenet1_1 googlenet inception_v3@299 shufflenet_v2_x1_0 mobilenet_v2 mobilenet_v3_small
    mnasnet1_0 resnet18 resnext50_32x4d wide_resnet50_2 densenet121 efficientnet_v2_s regnet_x_400mf regnet_y_400mf
    convnext_tiny
"""
SEGMENTATION = "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50"
MIXED = """
    poolformer_s12 convformer_s18 focalnet_tiny_srf edgenext_xx_small mobilevit_xxs efficientformer_l1@224
    mixer_s32_224@224 resmlp_12_224@224 visformer_tiny@224
"""


def _read(names: str, source: str, kind: str = "cnn") -> list[Architecture]:
    split = (name.partition("@") for name in names.split())
    return [Architecture(name, source, int(size or 64), kind, name in QUICK.split()) for name, _, size in split]


ARCHITECTURES: tuple[Architecture, ...] = (
    *_read(TIMM, "timm"),
    *_read(TORCHVISION, "torchvision"),
    *_read(SEGMENTATION, "segmentation"),
    *_read(MIXED, "timm", "mixed"),
)


def by_kind(kind: str) -> list[Architecture]:
    """All architectures of a kind."""
    return [architecture for architecture in ARCHITECTURES if architecture.kind == kind]
