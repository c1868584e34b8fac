"""VGG: Simonyan and Zisserman 2014."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import conv_bn, global_average, he_initialise, scaled

__all__ = ["VGG", "VGGSmall", "vgg11", "vgg16"]


# depth -> convolutions in each stage
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3 x 3 convolutions with 64, 128, 256, 512 and 512 channels, max pooling after each.

    Simonyan and Zisserman, 'Very deep convolutional networks for large-scale image recognition', 2014 (arXiv
    1409.1556), configurations A, B, D and E. BatchNorm follows each convolution, and global average pooling with one
    linear layer takes the place of the paper's two hidden layers of 4096 units. Pooling rounds up, so that images of
    fewer than 32 px end at one pixel rather than none.

    Args:
        depth: number of weighted layers in the paper: 11, 13, 16 or 19, three of which were linear.
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels.

    Raises:
        ValueError: a depth that is not one of the paper's.

    Example:
        >>> len([m for m in VGG(13, 3, 10, width=0.125).modules() if isinstance(m, nn.Conv2d)])
        10
    """

    def __init__(self, depth: int, in_channels: int, num_classes: int, *, width: float) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"`depth` of a VGG must be one of {', '.join(map(str, _STAGES))}, got {depth}")
        layers: list[nn.Module] = []
        channels = in_channels
        for convolutions, wide in zip(_STAGES[depth], (64, 128, 256, 512, 512), strict=True):
            for _ in range(convolutions):
                layers += conv_bn(channels, scaled(wide, width)), nn.ReLU()
                channels = scaled(wide, width)
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits


def vgg11(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> VGG:
    """VGG-11 with BatchNorm: 9.2 M parameters; the arguments are those of `VGG`.

    Example:
        >>> sum(p.numel() for p in vgg11().parameters())
        9228362
    """
    return VGG(11, in_channels, num_classes, width=width)


def vgg16(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> VGG:
    """VGG-16 with BatchNorm: 14.7 M parameters; the arguments are those of `VGG`.

    Example:
        >>> sum(p.numel() for p in vgg16().parameters())
        14724042
    """
    return VGG(16, in_channels, num_classes, width=width)


class VGGSmall(nn.Module):
    """Six 3 x 3 convolutions of 32, 64 and 128 channels with BatchNorm: 288,746 parameters on RGB images.

    The idea of Simonyan and Zisserman 2014 (arXiv 1409.1556) at the size of small images: pairs of 3 x 3
    convolutions, twice the channels wherever max pooling halves the sides; global average pooling before the only
    linear layer.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels.

    Example:
        >>> net = VGGSmall(in_channels=3)
        >>> sum(p.numel() for p in net.parameters())
        288746
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, wide in enumerate((32, 64, 128)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += conv_bn(channels, scaled(wide, width)), nn.ReLU()
                channels = scaled(wide, width)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W], 4 px or more a side."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits
