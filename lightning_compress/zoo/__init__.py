"""Networks, tasks and data sets to try the methods on.

The networks are pure torch and load nothing else; tasks and data sets need Lightning and load when first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_compress.zoo.bidirectional import ConvolutionalDBN, StackedConvAutoencoder
from lightning_compress.zoo.feedback import DeconvolutionalNetwork, HierarchicalSparseCoding
from lightning_compress.zoo.feedforward import (
    VGG,
    AlexNet,
    DenseNet,
    GoogLeNet,
    LeNet5,
    LeNet300100,
    MobileNetV1,
    MobileNetV2,
    MobileNetV2Small,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
    VGGSmall,
    WideResNet,
    densenet40,
    resnet20,
    resnet32,
    resnet56,
    resnet110,
    vgg11,
    vgg16,
    wrn_16_2,
    wrn_40_2,
)

if TYPE_CHECKING:
    from lightning_compress.zoo.datasets import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageDataModule, ImageFolder
    from lightning_compress.zoo.external import timm_model, torchvision_model
    from lightning_compress.zoo.tasks import ImageClassifier
    from lightning_compress.zoo.unsupervised import ContrastiveDivergence, ImageReconstruction

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "VGG",
    "AlexNet",
    "ContrastiveDivergence",
    "ConvolutionalDBN",
    "DeconvolutionalNetwork",
    "DenseNet",
    "Digits",
    "FashionMNIST",
    "GoogLeNet",
    "HierarchicalSparseCoding",
    "ImageClassifier",
    "ImageDataModule",
    "ImageFolder",
    "ImageReconstruction",
    "LeNet5",
    "LeNet300100",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV2Small",
    "ResNet",
    "ShuffleNetV2",
    "SqueezeNet",
    "StackedConvAutoencoder",
    "VGGSmall",
    "WideResNet",
    "densenet40",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "timm_model",
    "torchvision_model",
    "vgg11",
    "vgg16",
    "wrn_16_2",
    "wrn_40_2",
]

_LAZY = {
    "CIFAR10": "datasets",
    "CIFAR100": "datasets",
    "ContrastiveDivergence": "unsupervised",
    "Digits": "datasets",
    "FashionMNIST": "datasets",
    "ImageClassifier": "tasks",
    "ImageDataModule": "datasets",
    "ImageFolder": "datasets",
    "ImageReconstruction": "unsupervised",
    "timm_model": "external",
    "torchvision_model": "external",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        # with these two Python itself says what was perhaps meant
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
