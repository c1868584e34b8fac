"""Compact filters that outputs share: opposite pairs, and rotations of one kernel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors, Form, reset
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.matching import assign, gather_groups
from lightning_compress.methods.moments import Objective

__all__ = ["CReLU", "Ordered", "Rotated", "check_count", "default_table", "gram", "positions", "predict"]


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless an option is an integer, and not below the least.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")


def predict(form: Form, geometry: Geometry, weight: Tensor, rank: Any, second: Tensor | None) -> Candidate:
    """A candidate with the error of the form's beginning.

    Args:
        form: the form.
        geometry: the layer.
        weight: its weight, canonical.
        rank: the size.
        second: second moments of its patches; None: the identity.
    """
    matrix = weight.flatten(2)
    cross = matrix if second is None else matrix @ second
    objective = Objective(second, cross, float((cross * matrix).sum()))
    factors = form.start(geometry, weight, rank, second)
    return Candidate(rank, objective.error(form.compose(geometry, factors).flatten(2)))


def gram(weight: Tensor, second: Tensor | None) -> Tensor:
    """Inner products of a layer's outputs, [G, O, O], in the metric of its patches; None: of its filters."""
    matrix = weight.flatten(2)
    product = matrix @ (matrix if second is None else matrix @ second).transpose(1, 2)
    return (product + product.transpose(1, 2)) / 2


def default_table(geometry: Geometry, size: int) -> Tensor:
    """Groups of outputs, [G, heads, size], the first outputs being the heads; -1 where there are none left."""
    groups, outputs, _ = geometry.matrix
    heads = -(-outputs // size)
    table = torch.arange(heads * size).view(size, heads).T
    return torch.where(table < outputs, table, -1).expand(groups, -1, -1)


def positions(table: Tensor, outputs: int) -> Tensor:
    """The order of outputs that come as all heads, then the others, head by head.

    Args:
        table: groups of outputs, [G, heads, size]; -1 where there are none left.
        outputs: of a group of the layer.

    Returns:
        For each output its channel, [G * outputs].
    """
    groups, heads, size = table.shape
    lead = torch.arange(groups * heads, device=table.device).view(groups, heads, 1)
    follow = torch.arange(groups * heads * (size - 1), device=table.device).view(groups, heads, size - 1)
    channel = torch.cat([lead, groups * heads + follow], 2)
    output = table + outputs * torch.arange(groups, device=table.device)[:, None, None]
    order = torch.empty(groups * outputs, dtype=torch.int64, device=table.device)
    order[output[table >= 0]] = channel[table >= 0]
    return order


class Ordered(Form):
    """A form whose layers give the outputs in another order; the first of its factors is that order.

    Output o is channel `order[o]` of what comes before the `Reorder`; there may be more channels than outputs.
    """

    solves_outputs: ClassVar[bool] = False

    @abstractmethod
    def body(self, geometry: Geometry, rank: Any) -> tuple[Spec, ...]:
        """The layers before the `Reorder`."""

    @abstractmethod
    def default_order(self, geometry: Geometry) -> Tensor:
        """An order for layers that know nothing of the old one."""

    @abstractmethod
    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """Set biases; `bias` is that of the outputs, and zero for channels that are not used, before the `Reorder`."""

    def width(self, factors: Factors) -> int:
        """How many channels there are before the `Reorder`."""
        return len(factors[0])

    def spec(self, geometry: Geometry, rank: Any) -> Spec:
        """See `Form`."""
        reorder = {"type": "Reorder", "channels": geometry.outputs}
        return {"type": "Chain", "form": self.name, "layers": (*self.body(geometry, rank), reorder)}

    def fresh(self, geometry: Geometry, module: nn.Module) -> Factors:
        """See `Form`."""
        kernels = reset(module)
        return self.default_order(geometry).to(kernels[0].device), *kernels

    def fill(self, geometry: Geometry, module: nn.Module, factors: Factors, bias: Tensor | None) -> None:
        """See `Form`."""
        order, *kernels = factors
        chain = cast(nn.Sequential, module)
        self.set_kernels(geometry, chain, tuple(kernels))
        cast(layers.Reorder, chain[-1]).order.copy_(order)
        if bias is not None:
            channels = bias.new_zeros(self.width(factors))
            channels[order] = bias
            self.set_biases(chain, factors, channels)

    def set_kernels(self, geometry: Geometry, module: nn.Sequential, kernels: Factors) -> None:
        """Set the weights."""
        super().fill(geometry, module, kernels, None)


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


@dataclass(frozen=True)
class Rotated(Ordered):
    """Filters in fours: one kernel in its four rotations by 90 degrees. Fewer weights, as many multiply-accumulates.

    The weight sharing of p4 group convolutions (Cohen and Welling 2016, 'Group equivariant convolutional networks',
    arXiv 1602.07576), in the filters of one layer at a time: its inputs need not be any group's. Which outputs share a
    kernel, and which rotation each gets, is assigned by the Hungarian method, by turns with the kernels, which are
    least squares in the outputs.

    Example:
        >>> [layer["type"] for layer in Rotated().spec(Geometry.of(nn.Conv2d(8, 16, 3)), 4)["layers"]]
        ['Rotated', 'Reorder']
    """

    name: ClassVar[str] = "rotated"
    ROUNDS: ClassVar[int] = 20
    TURNS: ClassVar[int] = layers.Rotated.ROTATIONS

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if len(geometry.kernel) != 2 or geometry.kernel[0] != geometry.kernel[1] or geometry.kernel[0] < 2:
            return "has no square kernel of at least 2 x 2"
        if geometry.transposed or geometry.padding_mode != "zeros":
            return "is transposed or pads with something else than zeros"
        if geometry.padding == "same" and geometry.kernel[0] % 2 == 0:
            return "pads its two sides differently"
        return "has outputs that do not come in fours" if geometry.matrix[1] % self.TURNS else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. None of them is plain."""
        return ()

    def body(self, geometry: Geometry, rank: int) -> tuple[Spec, ...]:
        """See `Ordered`."""
        plain = dict(geometry.spec)
        del plain["padding_mode"]
        if isinstance(geometry.padding, str):
            plain["padding"] = tuple(d * (k // 2) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
        return ({**plain, "type": "Rotated"},)

    def default_order(self, geometry: Geometry) -> Tensor:
        """See `Ordered`."""
        return torch.arange(geometry.outputs)

    def fresh(self, geometry: Geometry, module: nn.Module) -> Factors:
        """See `Form`."""
        kernels = cast(Tensor, cast(nn.Sequential, module)[0].weight)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            new = nn.init.kaiming_normal_(torch.empty(kernels.shape), nonlinearity="linear")
        new = new.to(kernels.device).double().unflatten(0, (geometry.groups, -1))
        return self.default_order(geometry).to(kernels.device), new

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`. The size is the number of kernels."""
        return [predict(self, geometry, weight, geometry.outputs // self.TURNS, second)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        outputs = geometry.matrix[1]
        found = [self._share(block, None if second is None else second[g]) for g, block in enumerate(weight)]
        order = torch.cat([slots + g * outputs for g, (slots, _) in enumerate(found)])
        return order, torch.stack([kernels for _, kernels in found])

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        order, kernels = factors
        filters = layers.Rotated.rotate(kernels.flatten(0, 1), geometry.groups)
        weight: Tensor = filters[order].unflatten(0, (geometry.groups, -1))
        return weight

    def set_kernels(self, geometry: Geometry, module: nn.Sequential, kernels: Factors) -> None:
        """See `Ordered`."""
        cast(Tensor, module[0].weight).copy_(kernels[0].flatten(0, 1))

    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """See `Ordered`."""
        cast(Tensor, module[0].bias).copy_(bias)

    def _share(self, weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slot of each output of one group, and kernels; slot t * kernels + j is the j-th kernel turned t times."""
        outputs, shape, size = len(weight), weight.shape[1:], weight[0].numel()
        index = torch.arange(size, device=weight.device).view(shape)
        turned = torch.stack([torch.rot90(index, turn, (-2, -1)).flatten() for turn in range(self.TURNS)])
        back = torch.stack([torch.rot90(index, -turn, (-2, -1)).flatten() for turn in range(self.TURNS)])
        matrix = weight.flatten(1)
        metric = torch.eye(size, dtype=weight.dtype, device=weight.device) if second is None else second
        image = matrix @ metric
        # The kernels of all fours have the same normal matrix: the metric, averaged over rotations.
        normal = torch.stack([metric[b][:, b] for b in back]).sum(0)
        lift = 1e-9 * normal.diagonal().mean().clamp_min(1e-300)
        factor = torch.linalg.cholesky(normal + lift * torch.eye(size, dtype=weight.dtype, device=weight.device))
        energy = (image * matrix).sum(1)
        apart = [energy + ((r @ metric) * r).sum(1)[:, None] - 2 * r @ image.T for r in (matrix[:, t] for t in turned)]
        kernels = matrix[gather_groups(torch.stack(apart).amin(0).clamp_min(0.0), self.TURNS)[:, 0]]
        best, slots = -torch.inf, torch.arange(outputs, device=weight.device)
        for _ in range(self.ROUNDS):
            filters = torch.cat([kernels[:, t] for t in turned])
            slots = assign(-image @ filters.T)
            holders = slots.argsort().view(self.TURNS, -1)
            right = torch.stack([image[held][:, b] for held, b in zip(holders, back, strict=True)]).sum(0)
            kernels = torch.cholesky_solve(right.T, factor).T
            explained = float((right * kernels).sum())
            if explained <= best + 1e-9 * abs(best):
                break
            best = explained
        return slots, kernels.view(-1, *shape)
