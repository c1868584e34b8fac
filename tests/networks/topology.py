"""Skips, branches, gates, several inputs and outputs, and what lies between the layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.base import Network, block, classifier


class MaxUnpooling(Network):
    """The deconvolution network of Zeiler and Noh: pooling switches steer the unpooling on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = block(3, 12), block(12, 20)
        self.up2, self.up1 = nn.ConvTranspose2d(20, 12, 3, padding=1), nn.ConvTranspose2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, switches1 = F.max_pool2d(self.down1(x), 2, return_indices=True)
        x, switches2 = F.max_pool2d(self.down2(x), 2, return_indices=True)
        x = F.relu(self.up2(F.max_unpool2d(x, switches2, 2)))
        return self.head(F.relu(self.up1(F.max_unpool2d(x, switches1, 2))))


class GroupedTransposed(Network):
    """A transposed convolution in groups, fed by a grouped convolution with other groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24)
        self.grouped = block(24, 24, groups=6)
        self.up = nn.ConvTranspose2d(24, 16, 4, 2, 1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.up(self.grouped(self.stem(x))))))


class UNet(Network):
    """Two levels, strided down, transposed up, concatenated across."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.bottom = block(3, 12), block(12, 16, stride=2), block(16, 24, stride=2)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 12, 2, 2)
        self.merge2, self.merge1 = block(32, 16), block(24, 12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer(x)
        inner = self.inner(outer)
        x = self.merge2(torch.cat((inner, self.up2(self.bottom(inner))), 1))
        return self.head(self.merge1(torch.cat((outer, self.up1(x)), 1)))


class DataDependentBranch(Network):
    """Control flow on values: graph capture fails here, one real run sees one side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.high, self.low = block(16, 24), nn.Conv2d(16, 24, 1)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        high = bool(x.mean() > -10)
        x = self.stem(x)
        return self.head(self.high(x) if high else self.low(x))


class SqueezeExcite(Network):
    """A gate over channels, from their means; the residual sum joins gated and plain channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24)
        self.body = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.reduce, self.expand = nn.Linear(24, 6), nn.Linear(6, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3))))))
        return self.head(F.relu(x + y * gate[:, :, None, None]))


class PaddedShortcut(Network):
    """Option A of ResNet for CIFAR: the shortcut is subsampled and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.body = nn.Sequential(block(16, 32, stride=2), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.head = classifier(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))))


class DenseConnections(Network):
    """DenseNet: norms before convolutions, over ever longer concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(40)
        self.head = classifier(40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat((x, layer(F.relu(norm(x)))), 1)
        return self.head(F.relu(self.norm(x)))


class DepthwiseMultiplier(Network):
    """A depthwise convolution that makes two channels of each, then a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 12)
        self.depthwise = block(12, 24, groups=12)
        self.pointwise = block(24, 20, kernel=1)
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pointwise(self.depthwise(self.stem(x))))


class SeveralInputsAndOutputs(Network):
    """An image and a vector in, a dictionary with a nested tuple out."""

    shapes = ((2, 3, 12, 12), (2, 7))
    heads = ("label", "box", "mask")

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = block(3, 16), nn.Linear(7, 16)
        self.trunk = block(16, 24)
        self.label, self.box = nn.Linear(24, 10), nn.Linear(24, 4)
        self.mask = nn.Conv2d(24, 1, 1)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, object]:
        x = self.trunk(self.image(image) + self.vector(vector)[:, :, None, None])
        pooled = x.mean((2, 3))
        return {"classes": (self.label(pooled), self.box(pooled)), "mask": self.mask(x)}


class FeaturesOut(Network):
    """Feature maps leave the network beside the class scores: they must keep their channels."""

    heads = ("head", "second.0", "second.1")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 16), block(16, 24)
        self.third = block(24, 32)
        self.head = classifier(32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.second(self.first(x))
        return self.head(self.third(features)), features


class Nested(Network):
    """Lists in dictionaries in sequences, looked up by a name that depends on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = "b"
        self.stages = nn.ModuleDict(
            {
                "a": nn.ModuleList([block(3, 8)]),
                "b": nn.ModuleList([block(3, 16), nn.Sequential(nn.Sequential(block(16, 16)), nn.Identity())]),
            }
        )
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stages[self.mode]:
            x = layer(x)
        return self.head(x)


class RecurrentHead(Network):
    """An LSTM over the columns of the feature map (a text reader): an op that nobody taught."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 16), block(16, 24, stride=2))
        self.recurrent = nn.LSTM(24, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).mean(2).transpose(1, 2)
        return self.head(self.recurrent(columns)[0][:, -1])


class SpatialAttention(Network):
    """CBAM's second half: mean and maximum over the channels steer the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.attention = nn.Conv2d(2, 1, 3, padding=1)
        self.tail = block(16, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        summary = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return self.head(self.tail(x * torch.sigmoid(self.attention(summary))))


class NeighbourAttention(Network):
    """ECA: a 1-d convolution along the channels, where neighbours matter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.attention = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.tail = block(16, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.attention(x.mean((2, 3))[:, None]))
        return self.head(self.tail(x * gate.transpose(1, 2)[..., None]))


class SelfAttention(Network):
    """A convolutional stem, then one head of attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, stride=2)
        self.queries, self.keys, self.values = (nn.Conv2d(16, 12, 1) for _ in range(3))
        self.out = nn.Conv2d(12, 16, 1)
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).flatten(2) for layer in (self.queries, self.keys, self.values))
        weights = torch.softmax(q.transpose(1, 2) @ k / 4, dim=-1)
        return self.head(x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])))
