"""Opposite pairs of filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors
from lightning_compress.methods.forms.matching import gather_groups
from lightning_compress.methods.forms.ordered import Ordered, default_table, gram, positions, predict
from lightning_compress.methods.geometry import Geometry

__all__ = ["CReLU"]


@dataclass(frozen=True)
class CReLU(Ordered):
    """Half of the filters; each of the other outputs is a multiple of one of theirs.

    Shang, Sohn, Almeida and Lee 2016, 'Understanding and improving convolutional neural networks via concatenated
    rectified linear units' (arXiv 1603.05201): filters of trained networks come in pairs of opposite phase. Here the
    multiple (normally negative, but of either sign) and the bias of each output are weights, so no layer behind needs
    to change. Outputs are paired so that what their principal directions do not give is least; a pair is the best one
    of rank 1. Of an odd number of outputs, one stays alone.

    Example:
        >>> form, geometry = CReLU(), Geometry.of(nn.Conv2d(8, 16, 3, bias=False))
        >>> [(layer.outputs, layer.groups) for layer in form.layers(geometry, 8)]
        [(8, 1), (8, 8)]
    """

    name: ClassVar[str] = "crelu"

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if not geometry.kernel:
            return "is no convolution"
        return "has one output for each group" if geometry.matrix[1] == 1 else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. The rank is the number of filters that are left."""
        return (
            geometry.like(geometry.inputs, rank, geometry.groups, bias=geometry.bias),
            geometry.point(rank, rank, rank, geometry.bias),
        )

    def body(self, geometry: Geometry, rank: int) -> tuple[Spec, ...]:
        """See `Ordered`."""
        half, multiples = self.layers(geometry, rank)
        return half.spec, {"type": "Concat", "layers": ({"type": "Identity"}, multiples.spec)}

    def default_order(self, geometry: Geometry) -> Tensor:
        """See `Ordered`."""
        return positions(default_table(geometry, 2), geometry.matrix[1])

    def width(self, factors: Factors) -> int:
        """See `Ordered`."""
        return 2 * len(factors[2])

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        groups, outputs, _ = geometry.matrix
        return [predict(self, geometry, weight, groups * -(-outputs // 2), second)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        products = gram(weight, second)
        energy = products.diagonal(dim1=1, dim2=2)
        half, apart = (energy[:, :, None] + energy[:, None]) / 2, (energy[:, :, None] - energy[:, None]) / 2
        loss = half - (apart.square() + products.square()).sqrt()  # the smaller eigenvalue of the pair's 2 x 2 block
        table = torch.stack([gather_groups(block.clamp_min(0.0), 2) for block in loss])
        table = table.where(table[..., 1:] >= 0, torch.stack([table[..., 0], table[..., 0]], -1))
        ahead, behind = (energy.gather(1, table[..., place]) for place in range(2))
        table = torch.where((ahead >= behind)[..., None], table, table.flip(-1))
        first, last = table.unbind(-1)
        alone = first == last
        line = torch.arange(len(weight), device=weight.device)[:, None]
        angle = torch.atan2(2 * products[line, first, last], energy[line, first] - energy[line, last]) / 2
        angle = torch.where(alone, torch.zeros_like(angle), angle)  # in [-pi / 4, pi / 4]: multiples of at most 1
        shape = (*angle.shape, *([1] * (weight.dim() - 2)))
        cosine, sine = angle.cos().view(shape), angle.sin().view(shape)
        kernels = cosine * (cosine * weight[line, first] + sine * weight[line, last])
        table = torch.stack([first, torch.where(alone, -1, last)], -1)
        multiples = angle.tan().reshape(-1, 1, 1, *([1] * len(geometry.kernel)))
        return positions(table, geometry.matrix[1]), kernels, multiples

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        order, kernels, multiples = factors
        own = kernels.flatten(0, 1)
        weight: Tensor = torch.cat([own, multiples.flatten(0, 1) * own])[order].unflatten(0, (geometry.groups, -1))
        return weight

    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """See `Ordered`."""
        own, other = bias.chunk(2)
        cast(Tensor, module[0].bias).copy_(own)
        cast(Tensor, cast(layers.Concat, module[1])[1].bias).copy_(other - factors[2].flatten() * own)
