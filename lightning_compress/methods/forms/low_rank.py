"""Low-rank forms of convolutions and linear layers: two or three factors.

Each is given by the chain of plain layers that it makes, the kernel that the chain amounts to, and a closed-form
beginning for a weight: in the metric of the weight itself, or in that of the outputs that data gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.methods.approximation import Candidate, Factors, Form, leading, whitening
from lightning_compress.methods.geometry import Geometry

__all__ = ["Channel", "Decomposition", "Spatial", "Tucker"]


def _tails(squares: Tensor) -> list[float]:
    """What is lost, relative to all, when the first 1, 2, ... of the squares are kept; they are [G, n]."""
    total = squares.sum()
    if not total > 0:
        return [0.0] * squares.shape[-1]
    kept = squares.sum(0).cumsum(0)
    return [float(x) for x in (1 - kept / total).clamp_min(0.0)]


def _factor(second: Tensor | None, shape: tuple[int, int], like: Tensor) -> Tensor:
    """A square root of a metric; the identity for None."""
    if second is None:
        return torch.eye(shape[1], dtype=like.dtype, device=like.device).expand(shape[0], -1, -1)
    return whitening(second)


def _balance(first: Tensor, last: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors that share an index, dim 1 of the first and dim 2 of the last, with equal norms in it."""
    left = first.flatten(2).norm(dim=2)
    right = last.transpose(1, 2).flatten(2).norm(dim=2)
    scale = (right / left.clamp_min(1e-150)).sqrt().clamp(1e-6, 1e6)
    scale = torch.where((left > 0) & (right > 0), scale, torch.ones_like(scale))
    shape = (*scale.shape, *([1] * (first.dim() - 2)))
    turned = (scale.shape[0], 1, rank, *([1] * (last.dim() - 3)))
    return first * scale.view(shape), last / scale.view(turned)


@dataclass(frozen=True)
class Decomposition(Form):
    """A form whose size is a rank, or two.

    Args:
        round_to: ranks above this are multiples of it: kernels for vectors of 8 or 16 channels make other widths slower
            than they look.

    Raises:
        ValueError: it is below 1.

    Example:
        >>> Spatial(round_to=8).ranks(20)
        [16, 8, 7, 6, 5, 4, 3, 2, 1]
    """

    round_to: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"`round_to` must be an integer of at least 1, got {self.round_to!r}")

    def ranks(self, most: int) -> list[int]:
        """The ranks worth considering up to one, from the largest."""
        return [rank for rank in range(most, 0, -1) if rank < self.round_to or not rank % self.round_to] or [1]

    def rounded(self, rank: int, most: int) -> int:
        """The next rank upwards that is worth considering; the largest if there is none."""
        return rank if rank < self.round_to else min(-(-rank // self.round_to) * self.round_to, most)


@dataclass(frozen=True)
class Channel(Decomposition):
    """The layer with fewer outputs, then a pointwise one that brings them back; the SVD of a linear layer.

    Zhang, Zou, He and Sun 2015, 'Accelerating very deep convolutional networks' (arXiv 1505.06798): the best of all
    such for the outputs on data are their principal components. On linear layers: Denton et al. 2014
    (arXiv 1404.0736).

    Args:
        round_to: ranks above this are multiples of it.

    Example:
        >>> from torch import nn
        >>> form, geometry = Channel(), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [(layer.outputs, layer.kernel) for layer in form.layers(geometry, 4)]
        [(4, (3, 3)), (16, (1, 1))]
    """

    name: ClassVar[str] = "channel"

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        return "has one output for each group" if geometry.matrix[1] == 1 else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`."""
        middle = rank * geometry.groups
        return (
            geometry.like(geometry.inputs, middle, geometry.groups),
            geometry.point(middle, geometry.outputs, geometry.groups, geometry.bias),
        )

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        tails = _tails(self._principal(weight, second)[1])
        most = min(geometry.matrix[1:])
        return [Candidate(rank, tails[rank - 1]) for rank in self.ranks(most)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        vectors = self._principal(weight, second)[0][..., :rank]
        first = (vectors.transpose(1, 2) @ weight.flatten(2)).unflatten(2, weight.shape[2:])
        last = vectors.view(*vectors.shape, *([1] * len(geometry.kernel)))
        return _balance(first, last, rank)

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        first, last = factors
        return (last.flatten(2) @ first.flatten(2)).view(*last.shape[:2], *first.shape[2:])

    @staticmethod
    def _principal(weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = weight.flatten(2)
        gram = matrix @ (matrix if second is None else matrix @ second).transpose(1, 2)
        values, vectors = torch.linalg.eigh((gram + gram.transpose(1, 2)) / 2)
        return vectors.flip(-1), values.flip(-1).clamp_min(0.0)


@dataclass(frozen=True)
class Spatial(Decomposition):
    """A k x 1 convolution, then a 1 x k one.

    Jaderberg, Vedaldi and Zisserman 2014, 'Speeding up convolutional neural networks with low rank expansions'
    (arXiv 1405.3866). On data: the singular value decomposition in the metric of the input's covariance along the
    columns, then least squares in the outputs.

    Args:
        round_to: ranks above this are multiples of it.

    Example:
        >>> from torch import nn
        >>> form, geometry = Spatial(), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [(layer.outputs, layer.kernel) for layer in form.layers(geometry, 4)]
        [(4, (3, 1)), (16, (1, 3))]
    """

    name: ClassVar[str] = "spatial"

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if len(geometry.kernel) != 2 or min(geometry.kernel) < 2:
            return "its kernel has not two sides of at least 2"
        return None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`."""
        middle = rank * geometry.groups
        return (
            geometry.like(geometry.inputs, middle, geometry.groups, axes=(0,)),
            geometry.like(middle, geometry.outputs, geometry.groups, axes=(1,), bias=geometry.bias),
        )

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        tails = _tails(self._columns(geometry, weight, second)[1])
        most = min(weight.shape[2] * geometry.kernel[0], weight.shape[1] * geometry.kernel[1])
        return [Candidate(rank, tails[rank - 1]) for rank in self.ranks(most)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        (high, wide), channels = geometry.kernel, weight.shape[2]
        vectors, _, root, white = self._columns(geometry, weight, second)
        vectors = vectors[..., :rank]
        first = torch.linalg.solve_triangular(root.transpose(1, 2), vectors, upper=True).transpose(1, 2)
        last = vectors.transpose(1, 2) @ white  # [G, rank, wide * outputs]
        return _balance(
            first.reshape(-1, rank, channels, high, 1),
            last.unflatten(2, (wide, -1)).permute(0, 3, 1, 2).unsqueeze(3),
            rank,
        )

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        first, last = factors
        return torch.einsum("grci,gorj->gocij", first[..., 0], last[..., 0, :])

    @staticmethod
    def _columns(geometry: Geometry, weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Left vectors and squared values of the whitened matrix [(channel, row), (column, output)], with its parts."""
        groups, _, channels, high, wide = weight.shape
        matrix = weight.permute(0, 2, 3, 4, 1).reshape(groups, channels * high, -1)
        along = None
        if second is not None:  # of the pixels above each other, whichever column they are in
            tensor = second.view(groups, channels * high, wide, channels * high, wide)
            along = torch.einsum("gajbj->gab", tensor) / wide
        root = _factor(along, (groups, channels * high), weight)
        white = root.transpose(1, 2) @ matrix
        return *leading(white), root, white


@dataclass(frozen=True)
class Tucker(Decomposition):
    """A pointwise layer to fewer channels, the kernel between few channels, a pointwise layer back: Tucker-2.

    Kim et al. 2015, 'Compression of deep convolutional neural networks for fast and low power mobile applications'
    (arXiv 1511.06530). The rank is that of the inputs and that of the outputs.

    Args:
        round_to: ranks above this are multiples of it.

    Example:
        >>> from torch import nn
        >>> form, geometry = Tucker(), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [(layer.outputs, layer.kernel) for layer in form.layers(geometry, (2, 4))]
        [(2, (1, 1)), (4, (3, 3)), (16, (1, 1))]
    """

    name: ClassVar[str] = "tucker"
    STEPS: ClassVar[int] = 40

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if geometry.pointwise:
            return "has a kernel of a single tap"
        return "has one channel for each group" if 1 in geometry.matrix[1:2] or geometry.shape[2] == 1 else None

    def layers(self, geometry: Geometry, rank: tuple[int, int]) -> Sequence[Geometry]:
        """See `Form`."""
        groups = geometry.groups
        inner, outer = rank[0] * groups, rank[1] * groups
        return (
            geometry.point(geometry.inputs, inner, groups),
            geometry.like(inner, outer, groups),
            geometry.point(outer, geometry.outputs, groups, geometry.bias),
        )

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        inner = _tails(self._inputs(weight, second)[1])
        outer = _tails(Channel._principal(weight, second)[1])
        # Both modes lose the same energy; what they lose together is at most the sum.
        levels = sorted({*inner, *outer})
        chosen = [levels[round(i * (len(levels) - 1) / self.STEPS)] for i in range(self.STEPS + 1)]
        found: dict[tuple[int, int], Candidate] = {}
        for level in chosen:
            ranks = self.rounded(_least(inner, level), len(inner)), self.rounded(_least(outer, level), len(outer))
            found[ranks] = Candidate(ranks, min(1.0, inner[ranks[0] - 1] + outer[ranks[1] - 1]))
        return list(found.values())

    def start(self, geometry: Geometry, weight: Tensor, rank: tuple[int, int], second: Tensor | None) -> Factors:
        """See `Form`."""
        taps = [1] * len(geometry.kernel)
        vectors, _, root = self._inputs(weight, second)
        vectors = vectors[..., : rank[0]]
        decode = torch.linalg.solve_triangular(root.transpose(1, 2), vectors, upper=True)  # from few to all channels
        encode = vectors.transpose(1, 2) @ root.transpose(1, 2)
        # W = decode-then-W on encoded inputs: the kernel sees x through encode, so its own input side is W's on decode.
        core = torch.einsum("goc...,gcr->gor...", weight, decode)
        outer = Channel._principal(torch.einsum("gor...,grc->goc...", core, encode), second)[0][..., : rank[1]]
        core = torch.einsum("gor...,gos->gsr...", core, outer)
        return (
            encode.view(*encode.shape, *taps),
            core,
            outer.view(*outer.shape, *taps),
        )

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        encode, core, outer = factors
        middle = torch.einsum("gsr...,grc->gsc...", core, encode.flatten(2))
        return torch.einsum("gos,gsc...->goc...", outer.flatten(2), middle)

    @staticmethod
    def _inputs(weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Directions of the input channels that matter, in the metric of their covariance."""
        groups, _, channels, *kernel = weight.shape
        covariance = None
        if second is not None:
            taps = math.prod(kernel)
            covariance = torch.einsum("gcidi->gcd", second.view(groups, channels, taps, channels, taps)) / taps
        root = _factor(covariance, (groups, channels), weight)
        return *leading(root.transpose(1, 2) @ weight.transpose(1, 2).flatten(2)), root


def _least(tails: Sequence[float], level: float) -> int:
    """The smallest rank whose loss is at most `level`."""
    return next((rank for rank, tail in enumerate(tails, 1) if tail <= level), len(tails))
