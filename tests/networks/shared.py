"""Weights used twice, used functionally, derived from other weights, or not used at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.networks.base import Network, block, classifier


class TiedAutoencoder(Network):
    """One parameter encodes and, transposed, decodes."""

    heads = ()

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Parameter(torch.randn(12, 3, 3, 3) * 0.2)
        self.inner = nn.Parameter(torch.randn(20, 12, 3, 3) * 0.1)
        self.hidden_bias, self.bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(F.conv2d(x, self.outer, self.hidden_bias, padding=1))
        h = torch.sigmoid(F.conv2d(h, self.inner, stride=2, padding=1))
        h = F.conv_transpose2d(h, self.inner, self.hidden_bias, stride=2, padding=1, output_padding=1)
        return F.conv_transpose2d(torch.sigmoid(h), self.outer, self.bias, padding=1)


class TiedLinear(Network):
    """Two modules that hold one parameter, and a matrix product with its transpose."""

    shapes = ((2, 12),)
    heads = ("decoder",)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 20)
        self.middle = nn.Linear(20, 20)
        self.again = nn.Linear(20, 20, bias=False)
        self.again.weight = self.middle.weight
        self.decoder = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(torch.tanh(self.middle(torch.relu(self.encoder(x)))))
        return self.decoder(torch.relu(h) @ self.encoder.weight)


class RawParameter(Network):
    """Convolutions and norms called as functions on parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 3, 3, 3) * 0.2)
        self.second = nn.Parameter(torch.randn(20, 16, 3, 3) * 0.1)
        self.scale, self.shift = nn.Parameter(torch.ones(20)), nn.Parameter(torch.zeros(20))
        self.register_buffer("running_mean", torch.zeros(20))
        self.register_buffer("running_var", torch.ones(20))
        self.head = classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, padding=1))
        x = F.conv2d(x, self.second, padding=1)
        return self.head(F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.scale, self.shift)))


class CalledTwice(Network):
    """One layer called twice in a row, with a norm of its own for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.tail = block(16, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(self.tail(x))


class Siamese(Network):
    """One branch for two inputs; their difference is classified."""

    shapes = ((2, 3, 12, 12), (2, 3, 12, 12))

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(block(3, 16), block(16, 24, stride=2))
        self.head = classifier(24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.branch(x) - self.branch(y)).abs())


class UnrolledIsta(Network):
    """Convolutional sparse coding: three iterations of shrinkage that share one dictionary, and its transpose."""

    heads = ()

    def __init__(self) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(torch.randn(24, 3, 5, 5) * 0.1)
        self.threshold = nn.Parameter(torch.full((1, 24, 1, 1), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.zeros_like(F.conv2d(x, self.dictionary, padding=2))
        for _ in range(3):
            residual = x - F.conv_transpose2d(code, self.dictionary, padding=2)
            code = code + 0.1 * F.conv2d(residual, self.dictionary, padding=2)
            code = torch.sign(code) * F.relu(code.abs() - 0.1 * self.threshold)
        return F.conv_transpose2d(code, self.dictionary, padding=2)


class WeightNorm(Network):
    """Weights made of a direction and a length, by parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.mix = weight_norm(nn.Conv2d(16, 24, 3, padding=1))
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(F.relu(self.stem(x)))))


class WeightStandardized(Network):
    """Weight standardisation (arXiv 1903.10520): each filter is normalised over its inputs before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 24, 3, padding=1)
        self.tail = block(24, 16)
        self.head = classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        weight = self.mix.weight
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self.head(self.tail(F.conv2d(x, weight, self.mix.bias, padding=1)))


class ChannelScale(Network):
    """A parameter and a buffer with one value for each channel, and constants made in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16).view(1, 16, 1, 1))
        self.tail = block(16, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stem(x) * self.gamma * self.scale + 0.25))


class ChannelConstant(Network):
    """A constant of the channels' number, made in `forward`: it cannot be cut along."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.mix = block(16, 32)
        self.tail = block(32, 24)
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x))
        return self.head(self.tail(x + torch.arange(32, dtype=x.dtype, device=x.device).view(32, 1, 1) / 32))


class UnusedModule(Network):
    """A submodule that is never called, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 16), block(16, 24))
        self.auxiliary = classifier(16)
        self.spare = nn.Parameter(torch.randn(16))
        self.head = classifier(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
