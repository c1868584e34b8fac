"""Fire modules: few channels, from which some outputs need a single tap only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.edits import Spec
from lightning_compress.layers import Concat
from lightning_compress.methods.approximation import Candidate, Factors
from lightning_compress.methods.forms.low_rank import Tucker
from lightning_compress.methods.forms.ordered import Ordered, predict
from lightning_compress.methods.geometry import Geometry

__all__ = ["Fire"]


@dataclass(frozen=True)
class Fire(Ordered):
    """A pointwise layer to few channels; from there some outputs by a single tap, the others by the whole kernel.

    The module of SqueezeNet (Iandola et al. 2016, arXiv 1602.07360) without the ReLU between its layers. The few
    channels are the principal directions of the inputs for the outputs that they give; the outputs that lose least by
    it get the single tap.

    Args:
        squeeze: share of the input channels that are left between, in (0, 1].
        small: share of the outputs that get the single tap, in (0, 1).

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> form, geometry = Fire(), Geometry.of(nn.Conv2d(16, 32, 3, padding=1))
        >>> [(layer.inputs, layer.outputs, layer.kernel) for layer in form.layers(geometry, (4, 16))]
        [(16, 4, (1, 1)), (4, 16, (1, 1)), (4, 16, (3, 3))]
    """

    name: ClassVar[str] = "fire"
    squeeze: float = 0.25
    small: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.squeeze <= 1:
            raise ValueError(f"`squeeze` must be in (0, 1], got {self.squeeze!r}")
        if not 0 < self.small < 1:
            raise ValueError(f"`small` must be in (0, 1), got {self.small!r}")

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if math.prod(geometry.kernel) == 1:
            return "has a kernel of a single tap"
        if geometry.groups > 1 or geometry.transposed:
            return "is grouped or transposed"
        if min(geometry.outputs, geometry.inputs) < 2:
            return "has a single channel in or out"
        middle = tuple(d * (k - 1) // 2 for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
        if not all(side % 2 for side in geometry.kernel) or geometry.padding not in ("same", middle):
            return "its kernel has no tap in the middle, or its padding moves it away from the output's pixel"
        return None

    def layers(self, geometry: Geometry, rank: tuple[int, int]) -> Sequence[Geometry]:
        """See `Form`. The rank is the channels between and the outputs with a single tap."""
        squeezed, small = rank
        return (
            geometry.point(geometry.inputs, squeezed),
            replace(geometry.point(squeezed, small, bias=geometry.bias), stride=geometry.stride),
            geometry.like(squeezed, geometry.outputs - small, 1, bias=geometry.bias),
        )

    def body(self, geometry: Geometry, rank: tuple[int, int]) -> tuple[Spec, ...]:
        """See `Ordered`."""
        squeeze, small, large = self.layers(geometry, rank)
        return squeeze.spec, {"type": "Concat", "layers": (small.spec, large.spec)}

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        squeezed = math.ceil(self.squeeze * geometry.inputs)
        small = min(max(1, round(self.small * geometry.outputs)), geometry.outputs - 1)
        return [predict(self, geometry, weight, (squeezed, small), second)]

    def default_order(self, geometry: Geometry) -> Tensor:
        """See `Ordered`."""
        return torch.arange(geometry.outputs)

    def start(self, geometry: Geometry, weight: Tensor, rank: tuple[int, int], second: Tensor | None) -> Factors:
        """See `Form`."""
        squeezed, small = rank
        channels, taps = geometry.inputs, math.prod(geometry.kernel)
        encode = Tucker().start(geometry, weight, (squeezed, geometry.outputs), second)[0]
        basis = encode.flatten(2)[0]  # [squeezed, C]
        matrix = weight[0].flatten(1)
        image = (matrix if second is None else matrix @ second[0]).view(-1, channels, taps)
        right = torch.einsum("ock,rc->ork", image, basis)
        if second is None:
            normal = torch.einsum("rs,kl->rksl", basis @ basis.T, torch.eye(taps, dtype=basis.dtype).to(basis.device))
        else:
            normal = torch.einsum("rc,ckdl,sd->rksl", basis, second[0].view(channels, taps, channels, taps), basis)
        middle = taps // 2
        wide = _least_squares(normal.reshape(squeezed * taps, -1), right.flatten(1))
        narrow = _least_squares(normal[:, middle, :, middle], right[..., middle])
        lost = (right.flatten(1) * wide).sum(1) - (right[..., middle] * narrow).sum(1)
        chosen = lost.argsort()
        few, many = chosen[:small].sort().values, chosen[small:].sort().values
        ones = [1] * len(geometry.kernel)
        return (
            torch.cat([few, many]).argsort(),
            encode,
            narrow[few].view(1, small, squeezed, *ones),
            wide[many].view(1, -1, squeezed, *geometry.kernel),
        )

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        order, encode, narrow, wide = factors
        taps = math.prod(geometry.kernel)
        centre = torch.zeros(taps, dtype=encode.dtype, device=encode.device)
        centre[taps // 2] = 1.0
        mixed = torch.einsum("gor,grc->goc", narrow.flatten(2), encode.flatten(2))
        whole = torch.einsum("gork,grc->gock", wide.flatten(3), encode.flatten(2))
        weight: Tensor = torch.cat([mixed[..., None] * centre, whole], 1)[:, order].unflatten(3, geometry.kernel)
        return weight

    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """See `Ordered`."""
        shares = bias.split([factors[2].shape[1], factors[3].shape[1]])
        for branch, share in zip(cast(Concat, module[1]), shares, strict=True):
            cast(Tensor, branch.bias).copy_(share)


def _least_squares(normal: Tensor, right: Tensor) -> Tensor:
    """Solve x normal = right, [n, d], the normal matrix lifted a little where it is singular."""
    size = len(normal)
    lift = 1e-6 * normal.diagonal().mean().clamp_min(1e-300)
    factor = torch.linalg.cholesky(normal + lift * torch.eye(size, dtype=normal.dtype, device=normal.device))
    return torch.cholesky_solve(right.T, factor).T
