"""What forms whose outputs come in another order have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors, Form, reset
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Objective

__all__ = ["Ordered", "check_count", "default_table", "gram", "positions", "predict"]


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
