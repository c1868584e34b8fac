"""Feed-forward networks for small images (8 to 32 px), in pure torch.

Every network is built as `network(in_channels, num_classes, ...)` and takes `width`, a factor on its channels:
`width=0.5` is the thin network that a compressed one of the same cost has to beat.
"""

from __future__ import annotations

from lightning_compress.zoo.feedforward.alexnet import AlexNet
from lightning_compress.zoo.feedforward.densenet import DenseNet, densenet40
from lightning_compress.zoo.feedforward.googlenet import GoogLeNet
from lightning_compress.zoo.feedforward.lenet import LeNet5, LeNet300100
from lightning_compress.zoo.feedforward.mobilenet import MobileNetV1, MobileNetV2, MobileNetV2Small
from lightning_compress.zoo.feedforward.resnet import ResNet, resnet20, resnet32, resnet56, resnet110
from lightning_compress.zoo.feedforward.shufflenet import ShuffleNetV2
from lightning_compress.zoo.feedforward.squeezenet import SqueezeNet
from lightning_compress.zoo.feedforward.vgg import VGG, VGGSmall, vgg11, vgg16
from lightning_compress.zoo.feedforward.wide_resnet import WideResNet, wrn_16_2, wrn_40_2

__all__ = [
    "VGG",
    "AlexNet",
    "DenseNet",
    "GoogLeNet",
    "LeNet5",
    "LeNet300100",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV2Small",
    "ResNet",
    "ShuffleNetV2",
    "SqueezeNet",
    "VGGSmall",
    "WideResNet",
    "densenet40",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "vgg11",
    "vgg16",
    "wrn_16_2",
    "wrn_40_2",
]
