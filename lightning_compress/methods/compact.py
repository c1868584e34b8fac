"""Compact filters: convolutions written as those of compact architectures, from the trained weight and data.

Depthwise-separable layers, grouped layers with a shuffle, Fire modules, CReLU, rotated filters and Ghost modules were
made to be trained from scratch. Here each is the best approximation, near enough, of what a trained layer does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.edits import Spec
from lightning_compress.layers import Concat
from lightning_compress.methods.approximation import Candidate, Factors, Form, leading, whitening
from lightning_compress.methods.decompositions import Tucker
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.ghost import Ghost
from lightning_compress.methods.sharing import CReLU, Ordered, Rotated, check_count, predict

__all__ = ["COMPACT", "CReLU", "DepthwiseSeparable", "Fire", "Ghost", "GroupedShuffle", "Rotated"]


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


@dataclass(frozen=True)
class Fire(Ordered):
    """A pointwise layer to few channels; from there some outputs by a single tap, the others by the whole kernel.

    The module of SqueezeNet (Iandola et al. 2016, arXiv 1602.07360) without the ReLU between its layers. The few
    channels are the principal directions of the inputs for the outputs that they give; the outputs that lose least by
    it get the single tap.

    Args:
        squeeze: share of the input channels that are left between, in (0, 1].
        small: share of the outputs that get the single tap, in (0, 1).

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


COMPACT: Mapping[str, type[Form]] = {
    form.name: form for form in (DepthwiseSeparable, Ghost, Fire, GroupedShuffle, CReLU, Rotated)
}
"""Name -> form of compact filters."""
