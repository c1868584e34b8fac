"""Norms and activations with their own idea of channels, and other numbers of dims."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.base import Network, block, classifier


class GroupNormed(Network):
    """Group norms: statistics over parts of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(1, 24), nn.SiLU(),
            nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(24, 24), nn.SiLU(),
        )  # fmt: skip
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class ChannelsLast(Network):
    """A ConvNeXt block: layer norm over the last dim, linear layers as 1x1 convolutions, a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.norm = nn.LayerNorm(16)
        self.expand, self.reduce = nn.Linear(16, 48), nn.Linear(48, 16)
        self.gamma = nn.Parameter(torch.full((16,), 1e-6))
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.reduce(F.gelu(self.expand(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


class BareNorms(Network):
    """Norms without parameters: batch norm with statistics only, instance norm with none."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1), nn.InstanceNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 20, 3, padding=1), nn.InstanceNorm2d(20, affine=True, track_running_stats=True), nn.ReLU(),
        )  # fmt: skip
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class LocalResponse(Network):
    """AlexNet's norm over neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5)
        self.tail = block(16, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.norm(F.relu(self.stem(x)))))


class UnitFeatures(Network):
    """Features scaled to length one before a cosine classifier."""

    heads = ()

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 16), block(16, 24))
        self.prototypes = nn.Parameter(torch.randn(10, 24))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.features(x).mean((2, 3)), dim=1) @ F.normalize(self.prototypes, dim=1).t()


class PReLU(Network):
    """A slope for each channel, and one slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 24, 3, padding=1), nn.PReLU()
        )
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Signal(Network):
    """One spatial dim: dilated residual convolutions over time."""

    shapes = ((2, 2, 64),)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 5, padding=2)
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu(norm(layer(x)))
        return self.head(F.max_pool1d(x, 4).mean(2))


class Volume(Network):
    """Three spatial dims, up and down."""

    shapes = ((2, 1, 8, 8, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3, 1, 1))
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose3d(16, 8, 2, 2), nn.BatchNorm3d(8), nn.ReLU())
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.down(x)))
