"""AlexNet: Krizhevsky, Sutskever and Hinton 2012."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import he_initialise, scaled

__all__ = ["AlexNet"]


class AlexNet(nn.Module):
    """Five convolutions, three of them in two groups, and two hidden layers: 7.6 M parameters on 32 px RGB images.

    Krizhevsky, Sutskever and Hinton, 'ImageNet classification with deep convolutional neural networks', 2012: its
    96-256-384-384-256 channels and its two groups in the second, fourth and fifth convolution, once the halves of a
    network on two GPUs. Made for small images: filters of 5 x 5 without stride come first (11 x 11 with stride 4 in the
    paper), and the hidden layers are smaller (4096 units there). Overlapping pooling is the paper's; its local response
    normalisation is left out, which later networks found to be of no use.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels; pooling divides them by 8, rounded up.
        width: factor on the channels and hidden units; channels are rounded to even numbers.
        hidden: units of the two hidden layers.
        dropout: fraction of the inputs of each hidden layer that is dropped in training.

    Raises:
        ValueError: no pixels, no hidden units, or a dropout that is no fraction.

    Example:
        >>> net = AlexNet()
        >>> sum(p.numel() for p in net.parameters())
        7561610
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        *,
        width: float = 1.0,
        hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"`image_size` of AlexNet must be at least 1, got {image_size}")
        if hidden < 1:
            raise ValueError(f"`hidden` must be at least 1, got {hidden}")
        first, second, third, fourth, fifth = (scaled(wide, width, 2) for wide in (96, 256, 384, 384, 256))
        units = scaled(hidden, width)
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(fourth, fifth, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(fifth * math.ceil(image_size / 8) ** 2, units)
        self.fc7 = nn.Linear(units, units)
        self.fc8 = nn.Linear(units, num_classes)
        self.dropout = nn.Dropout(dropout)
        he_initialise(self, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, image_size, image_size]."""
        x = _pool(F.relu(self.conv1(x)))
        x = _pool(F.relu(self.conv2(x)))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = _pool(F.relu(self.conv5(x)))
        x = F.relu(self.fc6(self.dropout(x.flatten(1))))
        x = F.relu(self.fc7(self.dropout(x)))
        logits: Tensor = self.fc8(x)
        return logits


def _pool(x: Tensor) -> Tensor:
    """Overlapping maxima; padded, so that small images do not lose their borders."""
    return F.max_pool2d(x, 3, stride=2, padding=1)
