"""DenseNet: Huang, Liu, van der Maaten and Weinberger 2016."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import global_average, he_initialise, scaled

__all__ = ["DenseLayer", "DenseNet", "Transition", "densenet40"]


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3 x 3 convolution, whose few channels are appended to those that came in.

    Args:
        in_channels: channels that come in.
        growth: channels that are appended.
        dropout: fraction of these that is dropped in training.
    """

    def __init__(self, in_channels: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, in_channels + growth, H, W]."""
        return torch.cat([x, self.dropout(self.conv(F.relu(self.bn(x))))], 1)


class Transition(nn.Module):
    """Between dense blocks: BatchNorm, ReLU, a 1 x 1 convolution and average pooling.

    Args:
        channels: channels that come in and go out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, channels, H, W] to [N, channels, H / 2, W / 2]."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Three dense blocks of n layers, each of which sees all that came before it; depth 3n + 4.

    Huang, Liu, van der Maaten and Weinberger, 'Densely connected convolutional networks', 2016 (arXiv 1608.06993),
    without the bottlenecks and compression of DenseNet-BC.

    Args:
        depth: number of weighted layers: 40 or 100 in the paper.
        growth: channels that each layer adds.
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the growth and the channels of the first convolution.
        dropout: fraction that is dropped behind each convolution in training; the paper drops 0.2 without augmentation.

    Raises:
        ValueError: a depth that is not 3n + 4, or a growth below 1.

    Example:
        >>> DenseNet(10, 4, 3, 10, width=1.0, dropout=0.0)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int, growth: int, in_channels: int, num_classes: int, *, width: float, dropout: float
    ) -> None:
        super().__init__()
        layers, rest = divmod(depth - 4, 3)
        if rest or layers < 1:
            raise ValueError(f"`depth` of a DenseNet must be 3n + 4 (40, 100, ...), got {depth}")
        if growth < 1:
            raise ValueError(f"`growth` must be at least 1, got {growth}")
        channels, growth = scaled(16, width), scaled(growth, width)
        features: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                features.append(Transition(channels))
            for _ in range(layers):
                features.append(DenseLayer(channels, growth, dropout))
                channels += growth
        self.features = nn.Sequential(*features)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W], 4 px or more a side."""
        logits: Tensor = self.fc(global_average(F.relu(self.bn(self.features(x)))))
        return logits


def densenet40(
    in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, growth: int = 12, dropout: float = 0.0
) -> DenseNet:
    """DenseNet-40: 1.0 M parameters with the growth of 12; the arguments are those of `DenseNet`.

    Example:
        >>> sum(p.numel() for p in densenet40().parameters())
        1019722
    """
    return DenseNet(40, growth, in_channels, num_classes, width=width, dropout=dropout)
