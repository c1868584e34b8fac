"""Wide residual networks: Zagoruyko and Komodakis 2016."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import global_average, he_initialise, scaled

__all__ = ["PreActivationBlock", "WideResNet", "wrn_16_2", "wrn_40_2"]


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each behind BatchNorm and ReLU, and a shortcut around them.

    Args:
        in_channels: channels that come in.
        channels: channels that come out.
        stride: step of the first convolution.
        dropout: fraction that is dropped between the convolutions in training.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        # a projection sees what is activated, as in He et al. 2016 (arXiv 1603.05027); the identity passes all on
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Three stages of 16k, 32k and 64k channels, n blocks each with activation before convolution, depth 6n + 4.

    Zagoruyko and Komodakis, 'Wide residual networks', 2016 (arXiv 1605.07146).

    Args:
        depth: number of convolutions on the longest way: 16, 22, 28, 40 in the paper.
        widen: the paper's k.
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on all channels, those of the first convolution too, which k does not widen.
        dropout: fraction that is dropped inside each block in training; 0.3 where the paper drops any.

    Raises:
        ValueError: a depth that is not 6n + 4, or k below 1.

    Example:
        >>> import torch
        >>> WideResNet(10, 1, 3, 10, width=0.5, dropout=0.0)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int, widen: int, in_channels: int, num_classes: int, *, width: float, dropout: float
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"`depth` of a WideResNet must be 6n + 4 (16, 22, 28, 40, ...), got {depth}")
        if widen < 1:
            raise ValueError(f"`widen` must be at least 1, got {widen}")
        stem = scaled(16, width)
        first, second, third = (scaled(channels * widen, width) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.layer1 = self._stage(stem, first, blocks, 1, dropout)
        self.layer2 = self._stage(first, second, blocks, 2, dropout)
        self.layer3 = self._stage(second, third, blocks, 2, dropout)
        self.bn = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        he_initialise(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, dropout: float) -> nn.Sequential:
        first = PreActivationBlock(in_channels, channels, stride, dropout)
        return nn.Sequential(first, *(PreActivationBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(global_average(F.relu(self.bn(x))))
        return logits


def wrn_16_2(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, dropout: float = 0.0) -> WideResNet:
    """WRN-16-2: 0.69 M parameters; the arguments are those of `WideResNet`.

    Example:
        >>> sum(p.numel() for p in wrn_16_2().parameters())
        691674
    """
    return WideResNet(16, 2, in_channels, num_classes, width=width, dropout=dropout)


def wrn_40_2(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, dropout: float = 0.0) -> WideResNet:
    """WRN-40-2: 2.2 M parameters; the arguments are those of `WideResNet`.

    Example:
        >>> sum(p.numel() for p in wrn_40_2().parameters())
        2243546
    """
    return WideResNet(40, 2, in_channels, num_classes, width=width, dropout=dropout)
