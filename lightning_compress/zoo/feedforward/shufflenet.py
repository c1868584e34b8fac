"""ShuffleNet: Ma, Zhang, Zheng and Sun 2018."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import conv_bn, global_average, he_initialise, scaled

__all__ = ["ShuffleNetV2", "ShuffleUnit"]


class ShuffleUnit(nn.Module):
    """Half of the channels pass a depthwise convolution between two of 1 x 1, the others pass unchanged; then shuffle.

    Where it halves the sides, both parts see all channels, and the unchanged part gets a depthwise convolution as well.

    Args:
        in_channels: channels that come in.
        channels: channels that come out, an even number.
        stride: 2 where the sides are halved; with 1 as many channels come in as go out.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.shortcut: nn.Module | None = None
        if stride != 1:
            self.shortcut = nn.Sequential(
                conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
                conv_bn(in_channels, half, 1),
                nn.ReLU(),
            )
        self.branch = nn.Sequential(
            conv_bn(half if stride == 1 else in_channels, half, 1),
            nn.ReLU(),
            conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        same, changed = x.chunk(2, 1) if self.shortcut is None else (self.shortcut(x), x)
        return _shuffle(torch.cat([same, self.branch(changed)], 1))


class ShuffleNetV2(nn.Module):
    """Three stages of shuffle units, 116, 232 and 464 channels: 1.3 M parameters, 2,278,604 with 1000 classes.

    Ma, Zhang, Zheng and Sun, 'ShuffleNet V2: practical guidelines for efficient CNN architecture design', 2018 (arXiv
    1807.11164), in size 1x. Made for small images: the first convolution has no stride, and the pooling behind it is
    left out.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels; those of the stages are rounded to even numbers.

    Example:
        >>> net = ShuffleNetV2()
        >>> sum(p.numel() for p in net.parameters())
        1263854
    """

    # channels, units
    STAGES = ((116, 4), (232, 8), (464, 4))

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        channels, head = scaled(24, width), scaled(1024, width)
        layers: list[nn.Module] = [conv_bn(in_channels, channels), nn.ReLU()]
        for wide, units in self.STAGES:
            for unit in range(units):
                layers.append(ShuffleUnit(channels, scaled(wide, width, 2), 1 if unit else 2))
                channels = scaled(wide, width, 2)
        self.features = nn.Sequential(*layers, conv_bn(channels, head, 1), nn.ReLU())
        self.classifier = nn.Linear(head, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits


def _shuffle(x: Tensor) -> Tensor:
    """Channels of the two halves in turn; no size is written in, so that pruned halves are shuffled alike."""
    halves: Tensor = x.unflatten(1, (2, -1))
    return halves.transpose(1, 2).flatten(1, 2)
