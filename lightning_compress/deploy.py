"""Quantized networks as runtimes want them: integer weights, BatchNorm folded, quantizers where values are rounded.

While a copy of the network is traced for export, its calls of functions are replaced: a layer gets its weight and bias
through `DequantizeLinear` of integers, whatever is rounded goes through `QuantizeLinear` and `DequantizeLinear`, and
functions that rounding does the work of (a ReLU before a grid that starts at zero) go away. The fold of a BatchNorm is
exact: weights have a step for each output and a symmetric grid, so that the integers stay and the steps are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.grids import Grid
from lightning_compress.methods.placement import TRANSPARENT
from lightning_compress.methods.quantization import integers
from lightning_compress.quantized import WEIGHTED, Place, Rounding, Scope, input_prefix, scope_of

__all__ = ["SEPARATOR", "Emitting", "Linking", "link"]

Key = tuple[int, str, int]
"""Id of a module, name of a function, which of its calls."""

SEPARATOR = "/"
"""Stands for dots in names of buffers, which must have none."""

FINE = 2**20
"""Integers that the bias of a channel without weights has at least."""

LARGEST = 2**30
"""Of the integers of a bias, so that sums stay within 32 bits."""


@dataclass(frozen=True)
class Quantizer:
    """What a value was rounded by.

    Attributes:
        module: whose buffers its step and zero point are.
        prefix: of their names.
        grid: the integers.
    """

    module: nn.Module
    prefix: str
    grid: Grid

    @property
    def step(self) -> Tensor:
        """The step, a buffer."""
        return self.module.get_buffer(f"{self.prefix}_step")

    @property
    def zero(self) -> Tensor:
        """The zero point, a buffer."""
        return self.module.get_buffer(f"{self.prefix}_zero")


@dataclass
class Links:
    """What is to be written instead of which call.

    Attributes:
        feeds: call of a layer -> what its input was rounded by.
        biases: call of a layer -> the bias that it gets.
        norms: call of a layer -> the BatchNorm that is folded into it.
        again: call of a function that moves values -> what they are rounded by, before and after it.
        gone: calls that rounding does the work of.
        stored: call of a layer -> prefix of the names of its buffers in `constants`.
        constants: integers, steps and biases. They are no part of the network, and are to be traced beside it.
    """

    feeds: dict[Key, Quantizer] = field(default_factory=dict)
    biases: dict[Key, Tensor | None] = field(default_factory=dict)
    norms: dict[Key, nn.Module] = field(default_factory=dict)
    again: dict[Key, Quantizer] = field(default_factory=dict)
    gone: set[Key] = field(default_factory=set)
    stored: dict[Key, str] = field(default_factory=dict)
    constants: nn.Module = field(default_factory=nn.Module)


def link(network: nn.Module, run: Callable[[Linking], None]) -> Links:
    """Run a network once, see what follows on what, and work out the constants that `Emitting` writes.

    Args:
        network: the network, in evaluation mode, with weights that are what they are rounded to.
        run: runs it with the mode active.
    """
    linking = Linking()
    run(linking)
    links = linking.links
    for path, module in network.named_modules():
        scope = scope_of(module)
        for leaf, grid in scope.weights.items() if scope is not None else ():
            for key in [key for key in linking.weighted.get((id(module), leaf), ()) if key in links.feeds]:
                links.stored[key] = f"{path}.{leaf}_{key[1]}_{key[2]}".lstrip(".").replace(".", SEPARATOR)
                _store(module, leaf, grid, key, links)
    return links


class Linking(Rounding):
    """Rounds, and remembers what each value was rounded by, and which BatchNorm got what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.links = Links()
        self.weighted: dict[tuple[int, str], list[Key]] = {}
        self._by: dict[int, Quantizer] = {}
        self._made: dict[int, Key] = {}
        self._alive: list[Any] = []

    def call(
        self, module: nn.Module, place: Place, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `Calls`."""
        scope, key = scope_of(module), (id(module), *place)
        source = self._by.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        first = (*place, 0)
        if scope is not None and first in scope.inputs:
            source = Quantizer(module, input_prefix(first), scope.inputs[first])
        leaf = weight_leaf(module, scope, place, args)
        if leaf is not None:
            self.weighted.setdefault((id(module), leaf), []).append(key)
            self.links.biases[key] = args[2] if len(args) > 2 else None
            if source is not None:
                self.links.feeds[key] = source
        if scope is not None and scope.folded and place[0] == "batch_norm" and id(args[0]) in self._made:
            self.links.norms[self._made[id(args[0])]] = module
            self.links.gone.add(key)
        if scope is not None and place in scope.values and self._subsumed(module, scope, place, args, kwargs):
            self.links.gone.add(key)
        output = super().call(module, place, func, args, kwargs)
        if isinstance(output, Tensor):
            self._alive += [output, *args]  # so that no other gets its id
            if leaf is not None:
                self._made[id(output)] = key
        if scope is not None and place in scope.values:
            self._by[id(output)] = Quantizer(module, f"{place[0]}_{place[1]}", scope.values[place])
        elif place[0] in TRANSPARENT and source is not None and output is not args[0]:
            self.links.again[key] = source
            for part in output if isinstance(output, tuple | list) else [output]:
                self._by[id(part)] = source
                self._alive.append(part)
        return output

    def _subsumed(self, module: nn.Module, scope: Scope, place: Place, args: Any, kwargs: Any) -> bool:
        """Whether a grid lets nothing through that the function before it would not."""
        by = Quantizer(module, f"{place[0]}_{place[1]}", scope.values[place])
        step, zero = float(by.step), round(float(by.zero))
        if place[0] not in ("relu", "relu6", "hardtanh") or zero != by.grid.low:
            return False
        ceiling = {"relu": math.inf, "relu6": 6.0}.get(place[0])
        if ceiling is None:
            ceiling = float(kwargs.get("max_val", args[2] if len(args) > 2 else 1.0))
        return step * (by.grid.high - zero) <= ceiling * (1 + 1e-6)


class Emitting(Rounding):
    """Writes into the graph that is traced what runtimes fuse.

    Args:
        links: what `link` found.
    """

    def __init__(self, links: Links) -> None:
        super().__init__()
        self.links = links

    def call(
        self, module: nn.Module, place: Place, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `Calls`."""
        scope, key = scope_of(module), (id(module), *place)
        if scope is not None and scope.inputs:
            args, kwargs = self.with_inputs(module, scope, place, args, kwargs)
        pooled = _pooled(place[0], args, kwargs)
        flat = pooled is not None and place[0] == "mean" and not kwargs.get("keepdim", len(args) > 2 and args[2])
        if pooled is not None:
            output = pooled
        elif key in self.links.gone:
            output = args[0]
        else:
            output = self._compute(module, scope, place, func, args, kwargs)
        by_values = scope.values.get(place) if scope is not None else None
        if by_values is not None:
            output = self.rounded(module, f"{place[0]}_{place[1]}", by_values, output)
        elif key in self.links.again:
            again = self.links.again[key]
            output = pytree.tree_map_only(Tensor, lambda part: _round_trip(part, again), output)
        return output.flatten(1) if flat else output

    def rounded(self, module: nn.Module, prefix: str, grid: Grid, value: Tensor) -> Tensor:
        """See `Rounding`."""
        return _round_trip(value, Quantizer(module, prefix, grid))

    def _compute(
        self,
        module: nn.Module,
        scope: Scope | None,
        place: Place,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = self.links.stored.get((id(module), *place))
        if name is None or weight_leaf(module, scope, place, args) is None:
            return func(*args, **kwargs)
        constants = self.links.constants._buffers
        whole, scale, bias = (
            self.links.constants.get_buffer(f"{name}_{what}") for what in ("integers", "scale", "bias")
        )
        weight, unit = _dequantize(whole, scale, constants.get(f"{name}_zero"), 0), constants.get(f"{name}_unit")
        if unit is not None:
            bias = _dequantize(bias, unit, None, 0)
        if place[0] == "linear" and args[0].dim() == 2:
            shape = (args[0].shape[0], weight.shape[0])
            inputs = (args[0], weight, bias)
            return torch.onnx.ops.symbolic("Gemm", inputs, {"transB": 1}, dtype=torch.float32, shape=shape)
        rest = {name: value for name, value in kwargs.items() if name not in ("weight", "bias")}
        return func(args[0], weight, bias, *args[3:], **rest)


def weight_leaf(module: nn.Module, scope: Scope | None, place: Place, args: Any) -> str | None:
    """The name of the quantized weight that a call of a function gets."""
    if scope is None or not scope.weights or place[0] not in WEIGHTED:
        return None
    return next((leaf for leaf in scope.weights if len(args) > 1 and module._parameters[leaf] is args[1]), None)


@torch.no_grad()
def _store(module: nn.Module, leaf: str, grid: Grid, key: Key, links: Links) -> None:
    """The constants of a call of a layer: integers, their steps, and a bias."""
    source, norm, bias = links.feeds[key], links.norms.get(key), links.biases[key]
    weight, step = module._parameters[leaf], module.get_buffer(f"{leaf}_step")
    assert weight is not None
    whole, scale = integers(weight, step, grid), step.double()
    shift = torch.zeros_like(scale) if bias is None else bias.double()
    if norm is not None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        shift = (shift - norm.running_mean.double()) * factor
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        sides = [1] * (whole.dim() - 1)
        whole, scale = whole * factor.sign().to(torch.int8).view(-1, *sides), scale * factor.abs()
    unit = source.step.double()
    # A channel whose bias would not fit into 32 bits has weights that are nothing beside it: on a coarser grid, zero.
    least = torch.maximum(shift.abs() / (unit * LARGEST), torch.full_like(scale, 1e-20))
    coarse = scale < least
    wide = [1] * (whole.dim() - 1)
    kept = (whole.double() * (scale / least).view(-1, *wide)).round().to(torch.int8)
    whole, scale = torch.where(coarse.view(-1, *wide), kept, whole), torch.where(coarse, least, scale)
    # One without weights has its bias alone, which the products of steps have to be fine enough for.
    empty = (whole == 0).flatten(1).all(1) & (shift != 0)
    scale = torch.where(empty, torch.minimum(scale, shift.abs() / (unit * FINE)), scale)
    scale = scale.float()
    name, constants = links.stored[key], links.constants
    constants.register_buffer(f"{name}_integers", whole)
    constants.register_buffer(f"{name}_scale", scale)
    if key[1] != "linear":  # the runtime rounds a convolution's bias by itself
        constants.register_buffer(f"{name}_bias", shift.float())
        return
    # ONNX Runtime fuses a Gemm only if its weight has a zero point, and its bias is of integers.
    products = (unit.float() * scale).float()
    constants.register_buffer(f"{name}_zero", torch.zeros_like(scale, dtype=torch.int8))
    constants.register_buffer(f"{name}_bias", (shift / products.double()).round().to(torch.int32))
    constants.register_buffer(f"{name}_unit", products)


def _round_trip(x: Tensor, by: Quantizer) -> Tensor:
    """To integers and back."""
    kind = torch.int8 if by.grid.low < 0 else torch.uint8
    zero = by.zero.round().to(kind)
    whole = torch.onnx.ops.symbolic("QuantizeLinear", (x, by.step, zero), dtype=kind, shape=x.shape)
    full = torch.iinfo(kind)
    if by.grid.high < full.max and by.grid != Grid.signed(8):
        ends = (torch.full_like(zero, by.grid.low), torch.full_like(zero, by.grid.high))
        whole = torch.onnx.ops.symbolic("Clip", (whole, *ends), dtype=kind, shape=x.shape)
    return _dequantize(whole, by.step, zero, None)


def _dequantize(whole: Tensor, scale: Tensor, zero: Tensor | None, axis: int | None) -> Tensor:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    inputs = (whole, scale) if zero is None else (whole, scale, zero)
    return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=whole.shape)


def _pooled(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mean over both sides of images, as the one operation that runtimes have for it."""
    if name not in ("mean", "adaptive_avg_pool2d") or not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return None
    x, what = args[0], args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("output_size"))
    if name == "mean":
        sides = [what] if isinstance(what, int) else list(what or ())
        if sorted(side % 4 for side in sides) != [2, 3]:
            return None
    elif what not in (1, (1, 1), [1, 1]):
        return None
    shape = (x.shape[0], x.shape[1], 1, 1)
    pooled: Tensor = torch.onnx.ops.symbolic("GlobalAveragePool", (x,), dtype=x.dtype, shape=shape)
    return pooled
