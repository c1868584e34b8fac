"""Ghost modules: outputs made from others' outputs by cheap depthwise convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors, Init
from lightning_compress.methods.calibration import visit
from lightning_compress.methods.forms.matching import gather_groups
from lightning_compress.methods.forms.ordered import Ordered, check_count, default_table, gram, positions, predict
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import RIDGE, Moments, Objective
from lightning_compress.methods.replaceable import MAX_PATCH

if TYPE_CHECKING:
    from lightning_compress.methods.sequential import Data

__all__ = ["Ghost"]


@dataclass(frozen=True)
class Ghost(Ordered):
    """Some primary filters; each of the other outputs is a small depthwise convolution of a primary output.

    The Ghost module of Han et al. 2019, 'GhostNet: more features from cheap operations' (arXiv 1911.11907), where it
    is trained from scratch. From a trained layer and data: outputs are shared out into groups so that each is best
    predicted by the head of its group (R^2 of a least-squares kernel between the original's output maps); the heads'
    filters are least squares on the inputs, and the cheap kernels least squares on what the heads then give, borders
    included. From the weight alone, a ghost is a multiple of its head.

    Args:
        ratio: outputs for each primary filter, at least 2.
        kernel: side of the cheap kernels, odd.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> form, geometry = Ghost(ratio=2), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [(layer.outputs, layer.groups, layer.kernel) for layer in form.layers(geometry, 8)]
        [(8, 1, (3, 3)), (8, 8, (3, 3))]
    """

    name: ClassVar[str] = "ghost"
    ratio: int = 2
    kernel: int = 3

    def __post_init__(self) -> None:
        check_count("ratio", self.ratio, 2)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd, got {self.kernel}")

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if not geometry.kernel:
            return "is no convolution"
        return "has one output for each group" if geometry.matrix[1] == 1 else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. The rank is the number of primary filters."""
        primary = geometry.like(geometry.inputs, rank, geometry.groups, bias=geometry.bias)
        return primary, self._cheap(geometry, rank)

    def body(self, geometry: Geometry, rank: int) -> tuple[Spec, ...]:
        """See `Ordered`."""
        primary, cheap = self.layers(geometry, rank)
        return primary.spec, {"type": "Concat", "layers": ({"type": "Identity"}, cheap.spec)}

    def default_order(self, geometry: Geometry) -> Tensor:
        """See `Ordered`."""
        return positions(default_table(geometry, self.ratio), geometry.matrix[1])

    def width(self, factors: Factors) -> int:
        """See `Ordered`."""
        return len(factors[2]) * self.ratio

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`. The error is that of ghosts which are multiples of their heads: an upper bound."""
        groups, outputs, _ = geometry.matrix
        return [predict(self, geometry, weight, groups * -(-outputs // self.ratio), second)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`: with kernels of which only the middle tap is not zero."""
        products = gram(weight, second)
        table = torch.stack([gather_groups(loss, self.ratio) for loss in _multiples_loss(products)])
        return self._make(geometry, weight, table, products)

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`.

        Raises:
            ValueError: a cheap kernel has other taps than the middle one: no layer with the old kernel is the same.
        """
        order, primary, cheap = factors
        taps = cheap.flatten(2)
        if taps.count_nonzero() > taps[..., self._middle(geometry)].count_nonzero():
            raise ValueError("ghosts reach beyond the kernel of the layer that they replace")
        own = primary.flatten(0, 1)
        ghosts = own[:, None] * taps[..., self._middle(geometry)].view(*taps.shape[:2], *([1] * (own.dim() - 1)))
        weight: Tensor = torch.cat([own, ghosts.flatten(0, 1)])[order].unflatten(0, (geometry.groups, -1))
        return weight

    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """See `Ordered`. Away from the borders, each output has its bias."""
        cheap = factors[2].flatten(2)
        primary, others = bias[: len(cheap)], bias[len(cheap) :]
        through = (cheap.sum(2) * primary[:, None]).flatten()
        cast(Tensor, module[0].bias).copy_(primary)
        cast(Tensor, _ghosts(module).bias).copy_(others - through)

    def fit(self, rank: int, module: nn.Module, data: Data, init: Init) -> float:
        """See `Form`. Random kernels that there is no data to measure on have an error that is not a number."""
        layer, chain = data.layer, cast(nn.Sequential, module)
        geometry = layer.geometry
        informed = layer.informed and bool(data.calls)
        if init == "weights" or (init == "data" and not informed):
            return super().fit(rank, module, data, init)
        if not informed:
            self.fill(geometry, module, self.fresh(geometry, module), layer.bias)
            return math.nan
        objective = data.objective(init)
        if init == "random":
            error, offset = self._measure(data, chain, objective, self.fresh(geometry, module), solve=False)
        else:
            plain = self.start(geometry, layer.weight, rank, None)
            whole = self.compose(geometry, plain).flatten(2)
            limit = objective.error(whole)
            target = objective.solution(layer.weight.flatten(2)).view_as(layer.weight)
            factors = self._informed(data, target, objective)
            error, offset = self._measure(data, chain, objective, factors, solve=True)
            if error > limit:  # other groups than those of the weights, and worse on the data
                self.fill(geometry, module, plain, data.correct(objective.offset(whole)))
                return limit
        data.correct(offset)
        return error

    def _informed(self, data: Data, target: Tensor, objective: Objective) -> Factors:
        """Primary filters and groups from data, with cheap kernels to begin with."""
        geometry = data.layer.geometry
        products = gram(target, objective.second)
        loss = _multiples_loss(products)
        if self.kernel ** len(geometry.kernel) * geometry.outputs <= 2 * MAX_PATCH:
            maps = _Maps(replace(self._cheap(geometry, geometry.outputs), outputs=geometry.outputs))
            visit(data.model, data.layers, [data.layer.path], data.calls, lambda _, __, y: maps.add(y))
            groups, outputs, _ = geometry.matrix
            whole = maps.loss(data.layer.centred).view(groups, outputs, groups, outputs)
            loss = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        table = torch.stack([gather_groups(block, self.ratio) for block in loss])
        return self._make(geometry, target, table, products)

    def _measure(
        self, data: Data, chain: nn.Sequential, objective: Objective, factors: Factors, solve: bool
    ) -> tuple[float, Tensor | None]:
        """Set the weights of a module, cheap kernels by least squares if asked; its error, and its outputs' offset."""
        geometry, (order, primary, prior) = data.layer.geometry, factors
        heads = order.argsort()[: len(prior)]  # the output of each primary filter
        whole = objective.cross.new_zeros(objective.cross.shape)
        whole.flatten(0, 1)[heads] = primary.flatten(0, 1).flatten(1)
        offset = objective.offset(whole)
        self.set_kernels(geometry, chain, (primary, prior))
        cast(layers.Reorder, chain[-1]).order.copy_(order)
        if geometry.bias:
            cast(Tensor, chain[0].bias).copy_(cast(Tensor, offset)[heads])
        # What is wanted of each cheap kernel; of those that fill up the last group, nothing.
        source = order.new_full((self.width(factors),), -1)
        source[order] = torch.arange(len(order), device=order.device)
        source = source[len(prior) :]
        used = (source >= 0).to(objective.cross.dtype)

        def wanted(outputs: Tensor) -> Tensor:
            shape = (-1, *([1] * len(geometry.kernel)))
            return outputs.index_select(1, source.clamp_min(0)) * used.to(outputs.dtype).view(shape)

        moments = data.moments(Moments(self._cheap(geometry, len(prior))), "1.1", wanted)
        ghosts = moments.objective(data.layer.centred)
        start = prior.flatten(2)
        cheap = _solve(ghosts, start, moments.count) * used.view(*start.shape[:2], 1) if solve else start
        self.set_kernels(geometry, chain, (primary, cheap.view_as(prior)))
        left = (objective.apply(whole) * whole).sum() - 2 * (objective.cross * whole).sum() + objective.energy
        left = left + ghosts.energy * (ghosts.error(cheap) - 1)
        error = max(0.0, float(left) / objective.energy) if objective.energy else 0.0
        behind = ghosts.offset(cheap)
        if offset is None or behind is None:
            return error, None
        if geometry.bias:
            cast(Tensor, _ghosts(chain).bias).copy_(behind)
        return error, torch.cat([offset[heads], behind])[order]

    def _make(self, geometry: Geometry, weight: Tensor, table: Tensor, products: Tensor) -> Factors:
        """Factors of groups [G, heads, ratio]: the heads' rows of a weight, and multiples of them."""
        heads, others = table[..., 0], table[..., 1:]
        line = torch.arange(len(weight), device=weight.device)[:, None]
        energy = products.diagonal(dim1=1, dim2=2)[line, heads].clamp_min(1e-300)
        factor = products[line[..., None], heads[..., None], others.clamp_min(0)] / energy[..., None]
        factor = torch.where(others >= 0, factor, torch.zeros_like(factor))
        cheap = weight.new_zeros(heads.numel(), self.ratio - 1, 1, self.kernel ** len(geometry.kernel))
        cheap[..., self._middle(geometry)] = factor.view(*cheap.shape[:3])
        kernel = (self.kernel,) * len(geometry.kernel)
        return positions(table, geometry.matrix[1]), weight[line, heads], cheap.unflatten(3, kernel)

    def _cheap(self, geometry: Geometry, primaries: int) -> Geometry:
        """The depthwise layer on the primary outputs."""
        sides = range(len(geometry.kernel))
        point = geometry.point(primaries, primaries * (self.ratio - 1), primaries, geometry.bias)
        return replace(point, kernel=tuple(self.kernel for _ in sides), padding=tuple(self.kernel // 2 for _ in sides))

    def _middle(self, geometry: Geometry) -> int:
        return int(self.kernel ** len(geometry.kernel)) // 2


class _Maps:
    """How well a small kernel on one output map gives another: sums over data, then least squares for each pair."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry, self.count = geometry, 0
        self._sums: list[Tensor] = []

    def add(self, y: Tensor) -> None:
        """Add output maps, [N, O, ...]."""
        for patches, outputs in self.geometry.columns(y, y):
            self.count += patches.shape[2]
            flat = outputs[:, 0]
            second = patches @ patches.transpose(1, 2)
            cross = (patches.flatten(0, 1) @ flat.T).unflatten(0, patches.shape[:2])
            new = [second, cross, patches.sum(2), flat.sum(1), flat.square().sum(1)]
            self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def loss(self, centred: bool) -> Tensor:
        """What is left of output j when it is predicted from output i, [O, O]."""
        second, cross, patch, mean, energy = (total / self.count for total in self._sums)  # [O, K, K], [O, K, O], ...
        energies = second.diagonal(dim1=1, dim2=2)
        if centred:
            second = second - patch[:, :, None] * patch[:, None]
            cross = cross - patch[:, :, None] * mean
            energy = energy - mean.square()
        factor = torch.linalg.cholesky(second + _ridge(second, energies, 1e-6))
        explained = (torch.cholesky_solve(cross, factor) * cross).sum(1)
        return (energy - explained).clamp_min(0.0)


def _ridge(second: Tensor, energies: Tensor, relative: float) -> Tensor:
    """A Tikhonov term for each output map by itself; of one that never changes, what rounding calls for.

    Args:
        second: second moments of its patches, [O, K, K], about their means or not.
        energies: their mean squares, [O, K].
        relative: to the mean of the second moments.
    """
    term = relative * second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0.0) + 1e-12 * energies.mean(1) + 1e-300
    return term[:, None, None] * torch.eye(second.shape[1], dtype=second.dtype, device=second.device)


def _solve(objective: Objective, prior: Tensor, count: int) -> Tensor:
    """Cheap kernels of least error, [O, n, K]; what the data does not determine stays near `prior`."""
    second = cast(Tensor, objective.second)
    energies = second.diagonal(dim1=1, dim2=2)
    if objective.mean is not None:
        energies = energies + objective.mean[0].square()
    ridge = _ridge(second, energies, RIDGE * (1 + 100 * second.shape[1] / count))
    factor = torch.linalg.cholesky(second + ridge)
    return torch.cholesky_solve((objective.cross + prior @ ridge).transpose(1, 2), factor).transpose(1, 2)


def _multiples_loss(products: Tensor) -> Tensor:
    """What is left of output j when it is a multiple of output i, [G, i, j]."""
    energy = products.diagonal(dim1=1, dim2=2)
    explained = products.square() / energy[:, :, None].clamp_min(1e-300)
    return (energy[:, None] - explained).clamp_min(0.0)


def _ghosts(chain: nn.Sequential) -> nn.Module:
    return cast(layers.Concat, chain[1])[1]
