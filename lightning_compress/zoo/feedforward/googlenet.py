"""GoogLeNet: Szegedy et al. 2014."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import conv_bn, global_average, he_initialise, scaled

__all__ = ["GoogLeNet", "Inception"]


class Inception(nn.Module):
    """Four branches side by side: 1 x 1; 3 x 3 and 5 x 5 behind a narrowing 1 x 1; max pooling with a 1 x 1 behind it.

    Args:
        in_channels: channels that come in.
        single: channels of the 1 x 1 branch.
        reduce3: channels that the 3 x 3 convolution sees.
        wide3: channels that it gives.
        reduce5: channels that the 5 x 5 convolution sees.
        wide5: channels that it gives.
        pooled: channels of the pooling branch.
    """

    def __init__(
        self, in_channels: int, single: int, reduce3: int, wide3: int, reduce5: int, wide5: int, pooled: int
    ) -> None:
        super().__init__()
        self.channels = single + wide3 + wide5 + pooled
        self.branch1 = _conv(in_channels, single, 1)
        self.branch3 = nn.Sequential(_conv(in_channels, reduce3, 1), _conv(reduce3, wide3, 3))
        self.branch5 = nn.Sequential(_conv(in_channels, reduce5, 1), _conv(reduce5, wide5, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(in_channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H, W]."""
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pooled(x)], 1)


class GoogLeNet(nn.Module):
    """Nine inception modules: 6.0 M parameters.

    Szegedy et al., 'Going deeper with convolutions', 2014 (arXiv 1409.4842): the paper's widths (table 1), its 5 x 5
    branches as they are (other code has 3 x 3 there), with BatchNorm. Made for small images: a first convolution of
    3 x 3 without stride (7 x 7 with stride 2 in the paper), and no pooling before the first module. The auxiliary
    classifiers are left out.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels.
        dropout: fraction of the inputs of the linear layer that is dropped in training.

    Example:
        >>> net = GoogLeNet()
        >>> sum(p.numel() for p in net.parameters())
        5983402
    """

    # the arguments of `Inception` but the first
    STAGE3 = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))
    STAGE4 = (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    )
    STAGE5 = ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, dropout: float = 0.4
    ) -> None:
        super().__init__()
        first, second = scaled(64, width), scaled(192, width)
        self.stem = nn.Sequential(_conv(in_channels, first, 3), _conv(first, first, 1), _conv(first, second, 3))
        channels, stages = second, []
        for table in (self.STAGE3, self.STAGE4, self.STAGE5):
            modules = []
            for row in table:
                modules.append(Inception(channels, *(scaled(wide, width) for wide in row)))
                channels = modules[-1].channels
            stages.append(nn.Sequential(*modules))
        self.stage3, self.stage4, self.stage5 = stages
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.stage4(_pool(self.stage3(self.stem(x))))
        x = self.stage5(_pool(x))
        logits: Tensor = self.fc(self.dropout(global_average(x)))
        return logits


def _conv(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    return conv_bn(in_channels, channels, kernel).append(nn.ReLU())


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)
