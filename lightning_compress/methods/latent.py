"""Weights that are functions of latent ones: what a network computes with has few values, what is trained is real.

A kind says which values follow from latents, and what a gradient at the values is at the latents. That of a step
function is zero almost everywhere, so it is estimated: by the straight-through estimator (Bengio, Léonard and Courville
2013, arXiv 1308.3432), as if the step were the identity. What a kind knows of a tensor beside its latents is in a small
vector, its memory. The kind that needs no estimate, differentiable k-means, is in `soft_kmeans`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Binary", "Latent", "TernaryWeightNetwork", "TrainedTernary", "XnorNet"]

TWN_THRESHOLD = 0.7
"""Of the mean size of the weights, below which they become zero; the paper's, near the best for normal weights."""

TTQ_THRESHOLD = 0.05
"""Of the largest weight, below which weights become zero; the paper's."""

LEAST = 1e-6
"""The scale of a tensor of zeros."""

LEAST_SCALE = 0.01
"""In its unit; a trained scale does not fall below it: at zero no gradient would reach the latents any more."""


class Latent(ABC):
    """A way to compute values from latents. All methods are pure, and all tensors of the latents' dtype.

    Attributes:
        granularities: what may share a scale: a `layer`, an output `channel`; the paper's first.
        learns: whether the memory is trained.

    Example:
        >>> kind, latent = Binary(), torch.tensor([[0.5, -0.1]])
        >>> kind.values(latent, kind.begin(latent)).sign()
        tensor([[ 1., -1.]])
    """

    granularities: ClassVar[tuple[str, ...]] = ("layer",)
    learns: ClassVar[bool] = False

    def begin(self, weight: Tensor) -> Tensor:
        """The memory of a tensor whose weights become latents."""
        return weight.new_empty(0)

    @abstractmethod
    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """What the network computes with.

        Args:
            latent: what is trained.
            memory: what the kind knows beside it.
            hard: whether a kind that comes near its few values by and by is to take them now.
        """

    def follow(self, latent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and memory after the optimizer moved the latents."""
        return latent, memory

    def gradient(self, latent: Tensor, memory: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the latents, from that at the values: straight through."""
        return gradient

    def learn(self, latent: Tensor, memory: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The memory after a step of training it.

        Args:
            latent: the latents, before their step.
            memory: the memory, before its step.
            gradient: what `gradient` gave, clipped by now, perhaps.
            rate: the learning rate of the latents.
        """
        return memory


@dataclass(frozen=True)
class Binary(Latent):
    """Signs: BinaryConnect (Courbariaux, Bengio and David 2015, arXiv 1511.00363).

    The values are -s and s, where s is the mean size of the layer's weights when training of latents begins, so that
    the network goes on from where it is; the paper's code has such a factor as well (H). Latents are clipped to
    [-s, s], beyond which they could change without an effect.

    Example:
        >>> kind, weight = Binary(), torch.tensor([[0.5, -1.5]])
        >>> kind.values(weight, kind.begin(weight))
        tensor([[ 1., -1.]])
    """

    def begin(self, weight: Tensor) -> Tensor:
        """See `Latent`: the scale."""
        return weight.detach().abs().mean().clamp_min(LEAST).view(1)

    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """See `Latent`."""
        return torch.where(latent >= 0, memory, -memory)

    def follow(self, latent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Latent`: latents are clipped."""
        return latent.clamp(-memory, memory), memory


@dataclass(frozen=True)
class XnorNet(Latent):
    """Signs times the mean size of the latents: the weights of XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279).

    The paper's binary weight network: inputs stay real. The gradient of the sign is straight through where latents are
    within [-1, 1], as in the paper; that of the mean is exact, where the paper leaves out all but a latent's own share.

    Args:
        granularity: what shares a scale.

    Example:
        >>> kind = XnorNet()
        >>> kind.values(torch.tensor([[0.5, -1.5], [2.0, 2.0]]), torch.empty(0))
        tensor([[ 1., -1.],
                [ 2.,  2.]])
    """

    granularities: ClassVar[tuple[str, ...]] = ("channel", "layer")
    granularity: str = "channel"

    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """See `Latent`."""
        return _sign(latent) * latent.abs().mean(_dims(latent, self.granularity), keepdim=True)

    def gradient(self, latent: Tensor, memory: Tensor, gradient: Tensor) -> Tensor:
        """See `Latent`."""
        dims, sign = _dims(latent, self.granularity), _sign(latent)
        scale = latent.abs().mean(dims, keepdim=True)
        through = gradient * scale * (latent.abs() <= 1)
        return through + sign * (gradient * sign).mean(dims, keepdim=True)


@dataclass(frozen=True)
class TernaryWeightNetwork(Latent):
    """Signs and zeros times a scale: ternary weight networks (Li and Liu 2016, arXiv 1605.04711).

    Latents below 0.7 of their mean size become zero; the scale is the mean size of the others, the one with the least
    squared error.

    Args:
        granularity: what shares a threshold and a scale.

    Example:
        >>> TernaryWeightNetwork().values(torch.tensor([[0.1, -3.0, 1.0]]), torch.empty(0))
        tensor([[ 0., -2.,  2.]])
    """

    granularities: ClassVar[tuple[str, ...]] = ("layer", "channel")
    granularity: str = "layer"

    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """See `Latent`."""
        dims, size = _dims(latent, self.granularity), latent.abs()
        alive = size > TWN_THRESHOLD * size.mean(dims, keepdim=True)
        total = torch.where(alive, size, 0.0).sum(dims, keepdim=True)
        scale = total / alive.sum(dims, keepdim=True).clamp_min(1)
        return torch.where(alive, _sign(latent) * scale, 0.0)


@dataclass(frozen=True)
class TrainedTernary(Latent):
    """Zeros and two scales that are trained: trained ternary quantization (Zhu et al. 2016, arXiv 1612.01064).

    Latents within 0.05 of the largest become zero, those above are the positive scale, those below minus the negative
    one. The memory is both, in units of the mean size of the weights when training of latents begins, and this unit.
    They take steps of plain gradient descent along the sum over their places, at the learning rate of the weights. The
    units are those of the paper, whose scales are near one; without them the rate would have to be one for each layer.
    (The paper's formula for the negative scale lacks the sign that the chain rule gives it.)

    Example:
        >>> kind, weight = TrainedTernary(), torch.tensor([[0.01, -3.0, 1.0, 2.0]])
        >>> kind.values(weight, kind.begin(weight))
        tensor([[ 0.0000, -3.0000,  1.5000,  1.5000]])
    """

    learns: ClassVar[bool] = True

    def begin(self, weight: Tensor) -> Tensor:
        """See `Latent`: the positive and the negative scale, each the mean size of its weights, and their unit."""
        size = weight.detach().abs()
        unit = size.mean().clamp_min(LEAST)
        scales = [size[side].mean() / unit if side.any() else unit / unit for side in self._sides(weight.detach())]
        return torch.stack([*scales, unit])

    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """See `Latent`."""
        positive, negative = self._sides(latent)
        scales = memory[:2] * memory[2]
        return torch.where(positive, scales[0], torch.where(negative, -scales[1], 0.0))

    def gradient(self, latent: Tensor, memory: Tensor, gradient: Tensor) -> Tensor:
        """See `Latent`: straight through, times the scale of the side that a latent is on."""
        positive, negative = self._sides(latent)
        return gradient * torch.where(positive, memory[0], torch.where(negative, memory[1], 1.0))

    def learn(self, latent: Tensor, memory: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """See `Latent`. The gradient at the values is that at the latents over the scale: so it is clipped, too."""
        positive, negative = self._sides(latent)
        sums = [torch.where(positive, gradient, 0.0).sum(), -torch.where(negative, gradient, 0.0).sum()]
        scales = memory[:2] - rate * memory[2] * torch.stack(sums) / memory[:2]
        return torch.cat([scales.clamp_min(LEAST_SCALE), memory[2:]])

    @staticmethod
    def _sides(latent: Tensor) -> tuple[Tensor, Tensor]:
        threshold = TTQ_THRESHOLD * latent.abs().amax()
        return latent > threshold, latent < -threshold


SCALED: Mapping[str, type[Latent]] = {
    "binary": Binary,
    "xnor": XnorNet,
    "ternary": TernaryWeightNetwork,
    "ttq": TrainedTernary,
}
"""Kinds whose values are a scale times signs and zeros."""


def _sign(latent: Tensor) -> Tensor:
    """Signs, where that of zero is positive: there are two values, not three."""
    return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)


def _dims(latent: Tensor, granularity: str) -> tuple[int, ...]:
    """Those that are summed over, for one scale for each `layer` or `channel` (of the first dim)."""
    return tuple(range(1 if granularity == "channel" else 0, latent.dim()))
