"""Block-circulant weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.methods.approximation import Factors
from lightning_compress.methods.forms.ordered import check_count
from lightning_compress.methods.forms.structured import Structured, lifted
from lightning_compress.methods.geometry import Geometry
from lightning_compress.structured import unroll

__all__ = ["Circulant"]


@dataclass(frozen=True)
class Circulant(Structured):
    """Circulant matrices between blocks of inputs and of outputs, at each tap: `block` times fewer weights.

    Cheng et al. 2015, 'An exploration of parameter redundancy in deep networks with circulant projections' (arXiv
    1502.03436), and in blocks Ding et al. 2017, 'CirCNN' (arXiv 1708.08917), where they are trained from scratch. From
    a trained weight: the nearest is the mean along each wrapped diagonal. On data: least squares in the outputs,
    exactly; all blocks of outputs have the same normal matrix, second moments summed over turns of the blocks.
    Channels keep their order. A layer whose channels are no multiples of the block is left alone: padding them would
    make weights that nothing needs.

    Args:
        block: side of the circulant matrices, at least 2. From 8 on, powers of two, wide layers compute by FFT.

    Example:
        >>> from torch import nn
        >>> form, geometry = Circulant(block=4), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> form.rank(geometry), form.spec(geometry, 288)["layers"][0]["type"]
        (288, 'Circulant')
    """

    name: ClassVar[str] = "circulant"
    kind: ClassVar[str] = "Circulant"
    steps: ClassVar[int] = 0  # the beginning is the solution
    block: int = 4

    def __post_init__(self) -> None:
        check_count("block", self.block, 2)

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        inputs, outputs = geometry.shape[2], geometry.shape[1]
        if inputs % self.block or outputs % self.block:
            each = " of each group" if geometry.groups > 1 else ""
            return f"has {inputs} inputs and {outputs} outputs{each}: no multiples of the block, {self.block}"
        return super().refuses(geometry)

    def rank(self, geometry: Geometry) -> int:
        """See `Structured`."""
        return geometry.weights // self.block

    def options(self, geometry: Geometry) -> Mapping[str, Any]:
        """See `Structured`."""
        return {"block": self.block}

    def factor(self, geometry: Geometry, weight: Tensor) -> Tensor:
        """See `Structured`: [G, outputs / block, inputs / block, block, *kernel]."""
        blocks: Tensor = weight.unflatten(0, (geometry.groups, -1))
        return blocks

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        near = self._columns(self._blocks(weight)).mean(2)
        if second is None:
            return (near,)
        index = torch.arange(second.shape[-1], device=weight.device).view(1, 1, -1, self.block, *geometry.kernel)
        turns = self._columns([index] * self.block).flatten(3)[0, 0]  # of the patch, as each row of a block sees it
        seen = (second[:, turn][:, :, turn] for turn in turns)  # one at a time: they are large
        normal = functools.reduce(torch.add, seen)
        image = (weight.flatten(2) @ second).view_as(weight)
        right = self._columns(self._blocks(image)).sum(2).flatten(2)
        matrix, lift = lifted(normal)
        solution: Tensor = torch.linalg.solve(matrix, (right + lift * near.flatten(2)).transpose(1, 2))
        return (solution.transpose(1, 2).reshape(near.shape),)

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        weight: Tensor = unroll(factors[0].flatten(0, 1)).unflatten(0, (geometry.groups, -1))
        return weight

    def _blocks(self, weight: Tensor) -> Sequence[Tensor]:
        """The first, second, ... row of all blocks, each [G, outputs / block, inputs / block, block, *kernel]."""
        rows: Sequence[Tensor] = weight.unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block)).unbind(2)
        return rows

    def _columns(self, rows: Sequence[Tensor]) -> Tensor:
        """The first columns that each row of a block asks for, [G, outputs / block, row, inputs / block, block, *k]."""
        place = torch.arange(self.block, device=rows[0].device)
        turns = (place[:, None] - place) % self.block
        return torch.stack([row.index_select(3, turn) for row, turn in zip(rows, turns, strict=True)], 2)
