"""Networks, tasks and data sets to try the methods on.

The networks are pure torch and load nothing else; tasks and data sets need Lightning and load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_compress.zoo.feedforward import (
    LeNet5,
    LeNet300100,
    MobileNetV2Small,
    ResNet,
    VGGSmall,
    resnet20,
    resnet56,
)

if TYPE_CHECKING:
    from lightning_compress.zoo.datasets import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageDataModule, ImageFolder
    from lightning_compress.zoo.external import timm_model, torchvision_model
    from lightning_compress.zoo.tasks import ImageClassifier

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "FashionMNIST",
    "ImageClassifier",
    "ImageDataModule",
    "ImageFolder",
    "LeNet5",
    "LeNet300100",
    "MobileNetV2Small",
    "ResNet",
    "VGGSmall",
    "resnet20",
    "resnet56",
    "timm_model",
    "torchvision_model",
]

_LAZY = {
    "CIFAR10": "datasets",
    "CIFAR100": "datasets",
    "Digits": "datasets",
    "FashionMNIST": "datasets",
    "ImageClassifier": "tasks",
    "ImageDataModule": "datasets",
    "ImageFolder": "datasets",
    "timm_model": "external",
    "torchvision_model": "external",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
