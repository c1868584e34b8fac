"""Networks that methods must keep their promises on. No Lightning here: artifacts load without it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.bidirectional import TiedAutoencoder
from lightning_compress.zoo.feedback import SparseCoding


def conv(inputs: int, outputs: int, groups: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Plain(nn.Module):
    """Convolutions and linear layers, with a flatten between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 24), nn.MaxPool2d(2))
        self.hidden = nn.Linear(24 * 4, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.body(x).flatten(1))))


class Residual(nn.Module):
    """Two residual blocks; the second changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 16)
        self.a = nn.Sequential(conv(16, 16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.b = nn.Sequential(conv(16, 32), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.shortcut = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.a(x))
        x = torch.relu(self.shortcut(x) + self.b(x))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck with squeeze-excite, then a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(1, 48, size=1)
        self.depthwise = conv(48, 48, groups=48)
        self.squeeze = nn.Conv2d(48, 16, 1)
        self.excite = nn.Conv2d(16, 48, 1)
        self.project = conv(48, 32, size=1)
        self.grouped = conv(32, 48, groups=4)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.grouped(self.project(x * gate)).mean((2, 3)))


class FeedBack(nn.Module):
    """Two layers of sparse coding, unrolled: the same filters predict and correct, step after step."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = SparseCoding(1, 16, iterations=3, penalty=0.02)
        self.upper = SparseCoding(16, 24, iterations=3, penalty=0.02)
        self.head = nn.Linear(24 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        code = self.upper(F.max_pool2d(self.lower(x), 2))
        return self.head(F.max_pool2d(code, 2).flatten(1))


class BiDirectional(nn.Module):
    """Two tied autoencoders; it classifies from the top code and from what is left unexplained on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = TiedAutoencoder(1, 16)
        self.upper = TiedAutoencoder(16, 24)
        self.head = nn.Linear(24 * 4 + 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        code = self.upper(self.lower(x))
        error = x - self.lower.decode(self.upper.decode(code))
        return self.head(torch.cat([code.flatten(1), F.avg_pool2d(error, 2).flatten(1)], 1))


NETS: dict[str, type[nn.Module]] = {"plain": Plain, "residual": Residual, "depthwise": Depthwise}
"""Those that every method is tried on."""

TIED: dict[str, type[nn.Module]] = {"feed_back": FeedBack, "bi_directional": BiDirectional}
"""Those whose filters are used in both directions: one method of each scheme is tried on them."""

ALL = {**NETS, **TIED}
