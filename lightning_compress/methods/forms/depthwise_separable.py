"""Depthwise filters, then a pointwise layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.methods.approximation import Candidate, Factors, Form, leading, whitening
from lightning_compress.methods.forms.ordered import check_count
from lightning_compress.methods.geometry import Geometry

__all__ = ["DepthwiseSeparable"]


@dataclass(frozen=True)
class DepthwiseSeparable(Form):
    """`rank` depthwise filters for each input channel, then a pointwise layer.

    The form is that of MobileNets (Howard et al. 2017, arXiv 1704.04861). Guo, Li, Lin, Chen and Li 2018, 'Network
    Decoupling: from regular to depthwise separable convolutions' (arXiv 1808.05517) get it from a trained weight: of
    each input channel, the leading singular vectors of its filters. On data, those in the metric of the channel's
    patches; then pointwise and depthwise weights by turns, each least squares in the outputs. As many filters as the
    kernel has taps write every layer exactly.

    Args:
        rank: depthwise filters for each input channel, at least 1; None: every number is a candidate.

    Example:
        >>> from torch import nn
        >>> form, geometry = DepthwiseSeparable(), Geometry.of(nn.Conv2d(8, 16, 3, padding=1))
        >>> [(layer.outputs, layer.groups, layer.kernel) for layer in form.layers(geometry, 1)]
        [(8, 8, (3, 3)), (16, 1, (1, 1))]
    """

    name: ClassVar[str] = "depthwise_separable"
    rank: int | None = 1

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count("rank", self.rank, 1)

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if math.prod(geometry.kernel) == 1:
            return "has a kernel of a single tap"
        if geometry.shape[2] == 1:
            return "has one input channel for each group: it is depthwise already"
        if self.rank is not None and self.rank >= math.prod(geometry.kernel):
            return f"its kernel has no more than {self.rank} taps: so many filters save nothing"
        return None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`."""
        middle = geometry.inputs * rank
        return (
            geometry.like(geometry.inputs, middle, geometry.inputs),
            geometry.point(middle, geometry.outputs, geometry.groups, geometry.bias),
        )

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`. The errors are those before the pointwise layer makes up for some of it: an upper bound."""
        squares = self._filters(weight, second)[1]
        tails = squares.flip(-1).cumsum(-1).flip(-1).sum(0)  # what is lost from the first, second, ... filter on
        total = tails[0].clamp_min(1e-300)
        ranks = range(math.prod(geometry.kernel) - 1, 0, -1) if self.rank is None else [self.rank]
        return [Candidate(rank, float(tails[rank] / total)) for rank in ranks]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        vectors, _, root, white = self._filters(weight, second)
        vectors = vectors[..., :rank]
        filters = torch.linalg.solve_triangular(root.transpose(1, 2), vectors, upper=True).transpose(1, 2)
        mix = white.transpose(1, 2) @ vectors  # [G * C, O, rank]
        mix = mix.unflatten(0, weight.shape[:3:2]).transpose(1, 2).flatten(2)
        return filters.reshape(-1, rank, 1, *geometry.kernel), mix.view(*mix.shape, *([1] * len(geometry.kernel)))

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        filters, mix = factors
        rank, channels = filters.shape[1], geometry.shape[2]
        filters = filters.reshape(geometry.groups, channels, rank, -1)
        mix = mix.flatten(2).unflatten(2, (channels, rank))
        weight: Tensor = torch.einsum("gocm,gcmk->gock", mix, filters).unflatten(3, geometry.kernel)
        return weight

    @staticmethod
    def _filters(weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each input channel: left vectors and squared values of its whitened filters [K, O], and its parts."""
        groups, outputs, channels = weight.shape[:3]
        matrix = weight.flatten(3).permute(0, 2, 3, 1).reshape(groups * channels, -1, outputs)
        taps = matrix.shape[1]
        if second is None:
            root = torch.eye(taps, dtype=weight.dtype, device=weight.device).expand(groups * channels, -1, -1)
        else:
            own = second.view(groups, channels, taps, channels, taps).diagonal(dim1=1, dim2=3)
            root = whitening(own.movedim(-1, 1).flatten(0, 1))
        white = root.transpose(1, 2) @ matrix
        return *leading(white), root, white
