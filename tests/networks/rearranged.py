"""Channels that are shuffled, split, reshaped and put together again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.base import Network, block, classifier


class ChannelShuffle(Network):
    """ShuffleNet v1: grouped 1x1 convolutions with the channels transposed between groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24)
        self.squeeze = block(24, 12, kernel=1, groups=3)
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12))
        self.expand = nn.Sequential(nn.Conv2d(12, 24, 1, groups=3, bias=False), nn.BatchNorm2d(24))
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.squeeze(x)
        b, c, h, w = y.shape
        y = y.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(F.relu(x + self.expand(self.depthwise(y))))


class ChunkShuffle(Network):
    """ShuffleNet v2: half of the channels pass by, then the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.branches = nn.ModuleList(block(8, 8) for _ in range(2))
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, branch(right)), dim=1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


class ChunkConcat(Network):
    """C2f of YOLO: a chunked convolution whose parts and their descendants are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.split = block(16, 32, kernel=1)
        self.branches = nn.ModuleList(block(16, 16) for _ in range(2))
        self.merge = block(64, 24, kernel=1)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.stem(x)).chunk(2, 1))
        for branch in self.branches:
            parts.append(parts[-1] + branch(parts[-1]))
        return self.head(self.merge(torch.cat(parts, 1)))


class PixelShuffle(Network):
    """Sub-pixel convolution: four channels become one with four times the pixels."""

    heads = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.up = nn.Conv2d(16, 32, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.mix = block(8, 12)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(F.relu(self.shuffle(self.up(self.stem(x))))))


class SpaceToDepth(Network):
    """Pixel unshuffle in the middle, and four strided slices (the Focus stem of YOLOv5) at the front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(12, 12)
        self.unshuffle = nn.PixelUnshuffle(2)
        self.mix = block(48, 20)
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.head(self.mix(self.unshuffle(self.stem(torch.cat(corners, 1)))))


class SplitByNumber(Network):
    """A split whose sizes are written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 48)
        self.a, self.b, self.c = block(16, 8), block(16, 8), block(16, 8)
        self.tail = block(24, 20)
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.stem(x), 16, dim=1)
        return self.head(self.tail(torch.cat((self.a(a), self.b(b), self.c(c)), 1)))


class SplitByAttribute(Network):
    """Res2Net: the width of a split is an attribute, and each part is added to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.stem = block(3, 32)
        self.steps = nn.ModuleList(block(self.width, self.width) for _ in range(3))
        self.head = classifier(32)

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.split(self.stem(x), self.width, 1)
        done = [first]
        for part, step in zip(parts, self.steps, strict=True):
            done.append(step(part + done[-1]))
        return self.head(torch.cat(done, 1))


class ViewByNumber(Network):
    """A classifier after `view` with the size written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2))
        self.hidden = nn.Linear(512, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.features(x).view(-1, 512))))


class Flatten(Network):
    """LeNet: each channel becomes sixteen features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(4), nn.Sigmoid())
        self.hidden = nn.Linear(96, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.hidden(self.features(x).flatten(1))))


class Unflatten(Network):
    """A decoder: a linear layer whose features become channels times pixels."""

    shapes = ((2, 12),)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 16 * 4 * 4)
        self.up = nn.ConvTranspose2d(16, 10, 4, 2, 1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.ConvTranspose2d(10, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))).view(x.shape[0], -1, 4, 4)
        return torch.tanh(self.head(F.relu(self.norm(self.up(x)))))


class PartInPlace(Network):
    """A part of the channels is changed in place: `x[:, :k] += ...`, `relu_`, `mul_`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.part = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = block(24, 16)
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, :8] += self.part(x[:, :8])
        x.relu_()
        x[:, 8:16].mul_(0.5)
        return self.head(self.tail(x))


class Reversed(Network):
    """Channels in reverse order, rolled, and picked by an index list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.mix = block(16, 16)
        self.picked = block(8, 12)
        self.head = classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mix(torch.flip(x, (1,))) + torch.roll(x, 3, 1)
        return self.head(self.picked(x[:, [0, 2, 4, 6, 9, 11, 13, 15]]))


class Halves(Network):
    """Maxout and a gated linear unit: channel i meets channel i + n/2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.gate = nn.Conv2d(16, 24, 3, padding=1)
        self.tail = block(12, 16)
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).unflatten(1, (2, 16)).amax(1)
        return self.head(self.tail(F.glu(self.gate(x), 1)))
