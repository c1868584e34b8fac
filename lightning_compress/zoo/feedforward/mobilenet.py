"""MobileNet: Howard et al. 2017, Sandler et al. 2018."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import conv_bn, global_average, he_initialise, scaled

__all__ = ["InvertedResidual", "MobileNetV1", "MobileNetV2", "MobileNetV2Small"]


class MobileNetV1(nn.Module):
    """Thirteen pairs of depthwise 3 x 3 and 1 x 1 convolutions: 3.2 M parameters, 4,231,976 with 1000 classes.

    Howard et al., 'MobileNets: efficient convolutional neural networks for mobile vision applications', 2017 (arXiv
    1704.04861). Made for small images: the first two of its strides are left out, so the sides are divided by 8.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels, the paper's width multiplier.

    Example:
        >>> net = MobileNetV1()
        >>> sum(p.numel() for p in net.parameters())
        3217226
    """

    # channels, stride
    PAIRS = ((64, 1), (128, 1), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [conv_bn(in_channels, channels), nn.ReLU()]
        for wide, stride in self.PAIRS:
            layers += conv_bn(channels, channels, 3, stride, groups=channels), nn.ReLU()
            layers += conv_bn(channels, scaled(wide, width), 1), nn.ReLU()
            channels = scaled(wide, width)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits


class InvertedResidual(nn.Module):
    """Widen by a 1 x 1 convolution, filter depthwise, narrow without activation; a shortcut where shapes allow."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn(in_channels, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            conv_bn(hidden, channels, 1),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks: 2.2 M parameters, 3,504,872 with 1000 classes.

    Sandler et al., 'MobileNetV2: inverted residuals and linear bottlenecks', 2018 (arXiv 1801.04381). Made for small
    images: the first two of its strides are left out, so the sides are divided by 8.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels, the paper's width multiplier; here on the last convolution, too.

    Example:
        >>> net = MobileNetV2()
        >>> sum(p.numel() for p in net.parameters())
        2236682
    """

    # expansion, channels, blocks, stride of the first block
    STAGES: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    HEAD = 1280

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        channels, head = scaled(32, width), scaled(self.HEAD, width)
        layers: list[nn.Module] = [conv_bn(in_channels, channels), nn.ReLU6()]
        for expansion, wide, blocks, stride in self.STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, scaled(wide, width), 1 if block else stride, expansion))
                channels = scaled(wide, width)
        self.features = nn.Sequential(*layers, conv_bn(channels, head, 1), nn.ReLU6())
        self.classifier = nn.Linear(head, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits


class MobileNetV2Small(MobileNetV2):
    """Nine inverted residual blocks at an eighth of ImageNet's strides: 204,554 parameters on RGB images.

    Sandler et al., 'MobileNetV2: inverted residuals and linear bottlenecks', 2018 (arXiv 1801.04381): the first
    four of its seven stages, at full resolution through the first two, with a head of 256 channels.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        width: factor on the channels, the paper's width multiplier.

    Example:
        >>> net = MobileNetV2Small()
        >>> sum(p.numel() for p in net.parameters())
        204554
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2))
    HEAD = 256
