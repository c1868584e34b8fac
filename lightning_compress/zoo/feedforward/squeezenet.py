"""SqueezeNet: Iandola et al. 2016."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import global_average, he_initialise, scaled

__all__ = ["Fire", "SqueezeNet"]


class Fire(nn.Module):
    """Narrow by a 1 x 1 convolution, then widen by a 1 x 1 and a 3 x 3 side by side.

    Args:
        in_channels: channels that come in.
        squeeze: channels in between.
        expand: channels that each of the two gives.
    """

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, 2 * expand, H, W]."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """Eight fire modules and no linear layer: 0.73 M parameters, 1,235,496 with ImageNet's 1000 classes.

    Iandola et al., 'SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5 MB model size', 2016 (arXiv
    1602.07360), in the authors' second version, 1.1 (https://github.com/forresti/SqueezeNet): the paper's fire modules
    behind a first convolution of 3 x 3 with 64 filters instead of 7 x 7 with 96, pooled earlier. Made for small images:
    that convolution has no stride, and the pooling behind it is left out. It has no BatchNorm, as in the paper.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels.
        dropout: fraction of the inputs of the last convolution that is dropped in training.

    Example:
        >>> net = SqueezeNet()
        >>> sum(p.numel() for p in net.parameters())
        727626
    """

    # squeeze and expand of the fire modules; pooling comes before each stage but the first
    STAGES = (
        ((16, 64), (16, 64)),
        ((32, 128), (32, 128)),
        ((48, 192), (48, 192), (64, 256), (64, 256)),
    )

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, dropout: float = 0.5
    ) -> None:
        super().__init__()
        channels = scaled(64, width)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
        for number, stage in enumerate(self.STAGES):
            if number:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            for squeeze, expand in stage:
                layers.append(Fire(channels, scaled(squeeze, width), scaled(expand, width)))
                channels = 2 * scaled(expand, width)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        he_initialise(self, "fan_in")
        nn.init.normal_(self.classifier.weight, std=0.01)  # the authors': no class is far ahead from the start

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W], 4 px or more a side."""
        return global_average(F.relu(self.classifier(self.dropout(self.features(x)))))
