"""Residual networks for CIFAR: He, Zhang, Ren and Sun 2015."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import conv_bn, global_average, he_initialise, scaled

__all__ = ["BasicBlock", "PadShortcut", "ResNet", "Shortcut", "resnet20", "resnet32", "resnet56", "resnet110"]

Shortcut = Literal["A", "B"]


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, new channels filled with zeros; no parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels - in_channels) // 2
        self.after = channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            project = shortcut == "B"
            self.shortcut = (
                conv_bn(in_channels, channels, 1, stride) if project else PadShortcut(in_channels, channels, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual networks for CIFAR: three stages of 16, 32 and 64 channels, n blocks each, depth 6n + 2.

    He, Zhang, Ren and Sun, 'Deep residual learning for image recognition', 2015, section 4.2 (arXiv 1512.03385).

    Args:
        depth: number of weighted layers: 20, 32, 44, 56, 110 in the paper.
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels.
        shortcut: where the shape changes, "A" pads with zeros (the paper's on CIFAR), "B" projects by a 1 x 1
            convolution. Padded channels hold no weights, so nothing that they are added to can be cut: B prunes
            further.

    Raises:
        ValueError: a depth that is not 6n + 2, or another shortcut.

    Example:
        >>> import torch
        >>> ResNet(8, 3, 10, width=0.5, shortcut="B")(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, in_channels: int, num_classes: int, *, width: float, shortcut: Shortcut) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"`depth` of a ResNet must be 6n + 2 (20, 32, 44, 56, ...), got {depth}")
        if shortcut not in get_args(Shortcut):
            raise ValueError(f'`shortcut` must be "A" (padding) or "B" (projection), got {shortcut!r}')
        first, second, third = (scaled(channels, width) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = self._stage(first, first, blocks, 1, shortcut)
        self.layer2 = self._stage(first, second, blocks, 2, shortcut)
        self.layer3 = self._stage(second, third, blocks, 2, shortcut)
        self.fc = nn.Linear(third, num_classes)
        he_initialise(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(global_average(self.layer3(self.layer2(self.layer1(x)))))
        return logits


def resnet20(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-20: 0.27 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet20(shortcut="A").parameters())
        269722
    """
    return ResNet(20, in_channels, num_classes, width=width, shortcut=shortcut)


def resnet32(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-32: 0.46 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet32(shortcut="A").parameters())
        464154
    """
    return ResNet(32, in_channels, num_classes, width=width, shortcut=shortcut)


def resnet56(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-56: 0.85 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet56(shortcut="A").parameters())
        853018
    """
    return ResNet(56, in_channels, num_classes, width=width, shortcut=shortcut)


def resnet110(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-110: 1.7 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet110(shortcut="A").parameters())
        1727962
    """
    return ResNet(110, in_channels, num_classes, width=width, shortcut=shortcut)
