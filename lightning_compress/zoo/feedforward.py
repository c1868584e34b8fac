"""Feed-forward networks for small images (8 to 32 px), in pure torch.

Every network is built as `network(in_channels, num_classes, ...)` and takes `width`, a factor on its channels:
`width=0.5` is the thin network that a compressed one of the same cost has to beat.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LeNet5", "LeNet300100", "MobileNetV2Small", "ResNet", "VGGSmall", "resnet20", "resnet56"]

Shortcut = Literal["A", "B"]


class LeNet300100(nn.Sequential):
    """Two hidden layers of 300 and 100 units: 266,610 parameters on MNIST.

    LeCun, Bottou, Bengio and Haffner, 'Gradient-based learning applied to document recognition', 1998: the
    multilayer perceptron that Deep Compression (Han et al. 2016, arXiv 1510.00149) made the yardstick of pruning.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels.
        width: factor on the hidden units.

    Example:
        >>> net = LeNet300100()
        >>> sum(p.numel() for p in net.parameters())
        266610
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, *, width: float = 1.0
    ) -> None:
        first, second = _scaled(300, width), _scaled(100, width)
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, num_classes),
        )


class LeNet5(nn.Module):
    """Two convolutions of 20 and 50 filters, 500 hidden units: 431,080 parameters on MNIST.

    LeCun et al. 1998, in the shape that Caffe gave it and the compression literature uses since Deep Compression
    (Han et al. 2016, arXiv 1510.00149); ReLU after each layer.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels, at least 4. Below 16 px two 5 x 5 convolutions leave
            nothing, so they are padded there.
        width: factor on the filters and hidden units.

    Example:
        >>> net = LeNet5()
        >>> sum(p.numel() for p in net.parameters())
        431080
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28, *, width: float = 1.0
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"`image_size` of LeNet5 must be at least 4, got {image_size}")
        padding = 2 if image_size < 16 else 0
        first, second, hidden = (_scaled(channels, width) for channels in (20, 50, 500))
        side = image_size
        for _ in range(2):
            side = (side - 4 + 2 * padding) // 2
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=padding)
        self.conv2 = nn.Conv2d(first, second, 5, padding=padding)
        self.fc1 = nn.Linear(second * side**2, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, image_size, image_size]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


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
                layers += _conv_bn(channels, _scaled(wide, width)), nn.ReLU()
                channels = _scaled(wide, width)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        _he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W], 4 px or more a side."""
        logits: Tensor = self.classifier(_global_average(self.features(x)))
        return logits


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
                _conv_bn(in_channels, channels, 1, stride) if project else PadShortcut(in_channels, channels, stride)
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
    """

    def __init__(self, depth: int, in_channels: int, num_classes: int, *, width: float, shortcut: Shortcut) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"`depth` of a ResNet must be 6n + 2 (20, 32, 44, 56, ...), got {depth}")
        if shortcut not in get_args(Shortcut):
            raise ValueError(f'`shortcut` must be "A" (padding) or "B" (projection), got {shortcut!r}')
        first, second, third = (_scaled(channels, width) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = self._stage(first, first, blocks, 1, shortcut)
        self.layer2 = self._stage(first, second, blocks, 2, shortcut)
        self.layer3 = self._stage(second, third, blocks, 2, shortcut)
        self.fc = nn.Linear(third, num_classes)
        _he_initialise(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(_global_average(self.layer3(self.layer2(self.layer1(x)))))
        return logits


def resnet20(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-20: 0.27 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet20(shortcut="A").parameters())
        269722
    """
    return ResNet(20, in_channels, num_classes, width=width, shortcut=shortcut)


def resnet56(in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0, shortcut: Shortcut = "B") -> ResNet:
    """ResNet-56: 0.85 M parameters; the arguments are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet56(shortcut="A").parameters())
        853018
    """
    return ResNet(56, in_channels, num_classes, width=width, shortcut=shortcut)


class InvertedResidual(nn.Module):
    """Widen by a 1 x 1 convolution, filter depthwise, narrow without activation; a shortcut where shapes allow."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [_conv_bn(in_channels, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            _conv_bn(hidden, channels, 1),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2Small(nn.Module):
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

    # expansion, channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2))

    def __init__(self, in_channels: int = 3, num_classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        channels, head = _scaled(32, width), _scaled(256, width)
        layers: list[nn.Module] = [_conv_bn(in_channels, channels), nn.ReLU6()]
        for expansion, wide, blocks, stride in self.STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, _scaled(wide, width), 1 if block else stride, expansion))
                channels = _scaled(wide, width)
        self.features = nn.Sequential(*layers, _conv_bn(channels, head, 1), nn.ReLU6())
        self.classifier = nn.Linear(head, num_classes)
        _he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        logits: Tensor = self.classifier(_global_average(self.features(x)))
        return logits


def _conv_bn(in_channels: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the sides (divided by `stride`), and BatchNorm."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _global_average(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _scaled(channels: int, width: float) -> int:
    if not width > 0:
        raise ValueError(f"`width` must be above 0, got {width}")
    return max(1, round(channels * width))


def _he_initialise(model: nn.Module) -> None:
    """Normal weights that keep the variance through ReLU (He et al. 2015, arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
