"""Two grouped layers, with a shuffle of channels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors, Form, leading, whitening
from lightning_compress.methods.forms.ordered import check_count, predict
from lightning_compress.methods.geometry import Geometry

__all__ = ["GroupedShuffle"]


@dataclass(frozen=True)
class GroupedShuffle(Form):
    """A grouped convolution, a shuffle of its channels, a grouped pointwise layer.

    The unit of ShuffleNet (Zhang, Zhou, Lin and Sun 2017, arXiv 1707.01083); of a pointwise layer, two grouped ones.
    Every output sees every input, through a few channels: the block of the weight between a group of inputs and one of
    outputs has the rank of the channels that the two share (butterfly or Monarch matrices, Dao et al. 2022, arXiv
    2204.00595), which gives the beginning by a singular value decomposition of each block.

    Args:
        groups: of both layers, at least 2.

    Example:
        >>> from torch import nn
        >>> form, geometry = GroupedShuffle(groups=2), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [layer["type"] for layer in form.spec(geometry, 2)["layers"]]
        ['Conv2d', 'ChannelShuffle', 'Conv2d']
    """

    name: ClassVar[str] = "grouped_shuffle"
    groups: int = 4

    def __post_init__(self) -> None:
        check_count("groups", self.groups, 2)

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if not geometry.kernel:
            return "is no convolution"
        if geometry.groups > 1:
            return "has groups already"
        if geometry.inputs % self.groups or geometry.outputs % self.groups:
            return f"its {geometry.inputs} inputs and {geometry.outputs} outputs do not make {self.groups} groups"
        return None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. Between them are as many channels as outputs, or up to the next multiple of groups x groups."""
        middle = -(-geometry.outputs // rank**2) * rank**2
        return (
            geometry.like(geometry.inputs, middle, rank),
            geometry.point(middle, geometry.outputs, rank, geometry.bias),
        )

    def spec(self, geometry: Geometry, rank: int) -> Spec:
        """See `Form`."""
        first, last = self.layers(geometry, rank)
        shuffle = {"type": "ChannelShuffle", "groups": rank}
        return {"type": "Chain", "form": self.name, "layers": (first.spec, shuffle, last.spec)}

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        return [predict(self, geometry, weight, self.groups, second)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        shared = self.layers(geometry, rank)[0].outputs // rank**2
        blocks = weight[0].flatten(1).unflatten(0, (rank, -1)).unflatten(2, (rank, -1))  # [to, O, from, d]
        size = blocks.shape[3]
        if second is None:
            root = torch.eye(size, dtype=weight.dtype, device=weight.device).expand(rank, -1, -1)
        else:
            root = whitening(second[0].view(rank, size, rank, size).diagonal(dim1=0, dim2=2).movedim(-1, 0))
        white = torch.einsum("qde,poqd->pqeo", root, blocks).flatten(0, 1)
        vectors = leading(white)[0][..., :shared]
        if vectors.shape[2] < shared:  # inputs of a group are fewer than the channels that could carry them
            vectors = torch.cat([vectors, vectors.new_zeros(*vectors.shape[:2], shared - vectors.shape[2])], 2)
        mix = (white.transpose(1, 2) @ vectors).unflatten(0, (rank, rank))  # [to, from, O, shared]
        turned = root.transpose(1, 2).repeat(rank, 1, 1)
        filters = torch.linalg.solve_triangular(turned, vectors, upper=True).unflatten(0, (rank, rank))
        first = filters.permute(1, 0, 3, 2).reshape(rank, rank * shared, -1, *geometry.kernel)
        last = mix.permute(0, 2, 3, 1).flatten(2)  # after the shuffle the group that a channel comes from runs fastest
        return first, last.reshape(*last.shape, *([1] * len(geometry.kernel)))

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        first, last = factors
        groups = first.shape[0]
        first = first.unflatten(1, (groups, -1))  # [from, to, shared, C, ...]
        last = last.flatten(2).unflatten(2, (-1, groups))  # [to, O, shared, from]
        whole = torch.einsum("qprc...,porq->poqc...", first, last)
        return whole.flatten(2, 3).flatten(0, 1)[None]
