"""LeNet: LeCun, Bottou, Bengio and Haffner 1998."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import scaled

__all__ = ["LeNet5", "LeNet300100"]


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
        first, second = scaled(300, width), scaled(100, width)
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

    Raises:
        ValueError: images below 4 px.

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
        first, second, hidden = (scaled(channels, width) for channels in (20, 50, 500))
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
