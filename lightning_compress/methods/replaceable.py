"""The layers of a network that may be replaced: which, what each does, and in which order data reaches them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, resize_batch
from lightning_compress.edits import Spec, companions, describe
from lightning_compress.layers import Chain
from lightning_compress.methods.approximation import Form
from lightning_compress.methods.geometry import Geometry, weight_of
from lightning_compress.methods.uses import Uses
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["MAX_PATCH", "Layer", "Layers", "find_layers"]

MAX_PATCH = 4608
"""Rows of a patch above which its second moments would cost more than they give: 512 channels, 3 x 3."""


@dataclass(frozen=True)
class Layer:
    """A layer that may be replaced.

    Attributes:
        path: its dotted name.
        geometry: what it does, as one layer; for a chain that replaced a layer, that of the layer.
        weight: the weight that it amounts to, canonical, in double precision.
        bias: what it adds, [outputs]; None: nothing.
        spec: what is there now.
        places: for each of its calls on one sample, how many inputs it gets and their sides.
        norm: name of the BatchNorm that its outputs, and no others, go to.
        informed: whether moments of its inputs may be taken; else only its weight is known.
        downward: whether it is also called as its transpose.
        scale: what that norm makes of each output, [outputs], of geometric mean 1; None: there is no norm.
    """

    path: str
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    spec: Spec
    places: tuple[tuple[int, tuple[int, ...]], ...]
    norm: str | None = None
    informed: bool = True
    downward: bool = False
    scale: Tensor | None = None

    @property
    def scaled(self) -> Layer:
        """The layer with outputs as large as the norm behind it makes them: errors count where they matter."""
        if self.scale is None:
            return self
        shape = self.weight.shape[:2] + (1,) * (self.weight.dim() - 2)
        bias = None if self.bias is None else self.bias * self.scale.to(self.bias.dtype)
        return replace(self, weight=self.weight * self.scale.view(shape), bias=bias)

    @property
    def centred(self) -> bool:
        """Whether a constant takes up the mean of its outputs."""
        return self.geometry.bias or self.norm is not None


@dataclass(frozen=True)
class Layers:
    """The layers of a network.

    Attributes:
        found: those that may be replaced, in the order that data reaches them.
        left: path -> why not, for the others that have weights of the kind.
        hits: for each call, path -> how often the layer runs in it.
    """

    found: tuple[Layer, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    hits: tuple[Mapping[str, int], ...] = ()


def find_layers(model: nn.Module, calls: Sequence[Call], forms: Mapping[str, Form]) -> Layers:
    """The plain layers of a network, and the chains that replaced some.

    Args:
        model: the network.
        calls: how it is called, once.
        forms: name -> form, of the chains that may be written anew.
    """
    kinds = _kinds(model, forms)
    with without_observers(model), undisturbed(model):
        trace = _Trace(model, kinds)
        trace.run(resize_batch(calls, 1))
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
    found, left = [], {}
    for path in [*dict.fromkeys(trace.order), *(path for path in kinds if path not in trace.order)]:
        module, kind = model.get_submodule(path), kinds[path]
        reason = _reason(path, module, kind, trace, owners)
        if reason is not None:
            left[path] = reason
            continue
        assert not isinstance(kind, str)
        geometry, weight = kind
        # what a layer sees upward says nothing of what its transpose sees: the weight itself counts for both
        downward = path in trace.downward
        informed = geometry.matrix[2] <= MAX_PATCH and not downward
        spec = describe(module)
        assert spec is not None
        added = (module[-1] if isinstance(module, Chain) else module)._parameters.get("bias")
        bias = None if added is None else added.detach()
        norm = trace.norm(path)
        scale = None if norm is None else _scale(model.get_submodule(norm))
        places = tuple(trace.places[path])
        found.append(Layer(path, geometry, weight, bias, spec, places, norm, informed, downward, scale))
    return Layers(tuple(found), left, tuple(trace.hits))


def _kinds(model: nn.Module, forms: Mapping[str, Form]) -> dict[str, tuple[Geometry, Tensor] | str]:
    """Path -> geometry and weight, or why a layer with a weight of the kind has none."""
    kinds: dict[str, tuple[Geometry, Tensor] | str] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{other}.") for other in kinds):
            continue  # a part of a chain
        if isinstance(module, Chain):
            form = forms.get(module.form)
            parts = [Geometry.of(part) for part in module]
            if form is None or not all(parts):
                kinds[path] = f"is {module.form or 'a chain'} already"
            else:
                kinds[path] = _amounts_to(form, module)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            geometry = Geometry.of(module)
            if geometry is None or "weight" not in module._parameters:
                kinds[path] = f"is a {type(module).__name__}, no plain layer of torch"
            else:
                kinds[path] = geometry, geometry.canonical(weight_of(module).detach().double())
    return kinds


def _amounts_to(form: Form, chain: Chain) -> tuple[Geometry, Tensor]:
    """The one layer that a chain does the work of."""
    parts = [geometry for geometry in map(Geometry.of, chain) if geometry is not None]
    first, last = parts[0], parts[-1]
    sides = range(len(first.kernel))
    same = next((part.padding for part in parts if isinstance(part.padding, str)), None)
    geometry = Geometry(
        first.inputs,
        last.outputs,
        tuple(max(part.kernel[axis] for part in parts) for axis in sides),
        tuple(max(part.stride[axis] for part in parts) for axis in sides),
        same or tuple(max(int(part.padding[axis]) for part in parts) for axis in sides),
        tuple(max(part.dilation[axis] for part in parts) for axis in sides),
        tuple(max(part.output_padding[axis] for part in parts) for axis in sides) if first.output_padding else (),
        last.groups,
        any(part.transposed for part in parts),
        next((part.padding_mode for part in parts if part.padding_mode != "zeros"), "zeros"),
        last.bias,
    )
    pairs = zip(chain, parts, strict=True)
    factors = tuple(part.canonical(weight_of(layer).detach().double()) for layer, part in pairs)
    return geometry, form.compose(geometry, factors)


def _scale(norm: nn.Module) -> Tensor | None:
    """What a BatchNorm multiplies each channel by."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_var is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().abs()
    scale = scale.clamp_min(1e-3 * float(scale.max()))  # a channel that is switched off may be switched on again
    scale = scale / scale.log().mean().exp()
    return scale if torch.isfinite(scale).all() else None


def _reason(
    path: str, module: nn.Module, kind: tuple[Geometry, Tensor] | str, trace: _Trace, owners: Mapping[int, set[int]]
) -> str | None:
    if isinstance(kind, str):
        return kind
    if not path:
        return "is the network itself"
    if path not in trace.places:
        return "is not called on the data"
    if any(True for part in module.modules() for _ in companions(part)):
        return "has weights that are pruned or shared or latent, which would be lost"
    parameters = list(module.parameters())
    if any(len(owners[id(parameter)]) > 1 for parameter in parameters):
        return "shares its weight with another layer"
    if any(id(parameter) in trace.outside for parameter in parameters):
        return (
            "has a weight that is also used outside of its own call (a TiedConv2d that is called with transposed=True "
            "can be replaced in both uses)"
        )
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        return "has weights that are not finite"
    return None


class _Trace(Uses):
    """One run: which layers run, in which order, on what, and who else uses their weights."""

    def __init__(self, model: nn.Module, paths: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.paths = paths
        self.order: list[str] = []
        self.places: dict[str, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        self.hits: list[Counter[str]] = []
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._normed: dict[str, str | None] = {}
        self._norms: Counter[str] = Counter()

    def norm(self, path: str) -> str | None:
        """The BatchNorm that the layer's outputs go to, if nothing else goes there."""
        name = self._normed.get(path)
        return name if name is not None and self._norms[name] == len(self.places[path]) else None

    def begin(self, call: Call) -> None:
        """See `Uses`."""
        self.hits.append(Counter())

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See `Uses`."""
        super().enter(path, module, args, kwargs)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and args:
            self._norms[path] += 1
            source = self._outputs.get(id(args[0]))
            if source is not None and module.track_running_stats:
                self._normed[source[0]] = path
        if path in self.paths and args and isinstance(args[0], Tensor):
            if kwargs.get("transposed") is not True:
                self._place(path, args[0])
            self.order.append(path)
            self.hits[-1][path] += 1

    def leave(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """See `Uses`."""
        super().leave(path, module, args, kwargs, output)
        if path in self.paths and isinstance(output, Tensor):
            self._outputs[id(output)] = path, output  # held, so that no other tensor gets its id
            if kwargs.get("transposed") is True:  # it costs what the layer costs on what comes out
                self._place(path, output)

    def _place(self, path: str, x: Tensor) -> None:
        kind = self.paths[path]
        sides = len((Geometry(1, 1) if isinstance(kind, str) else kind[0]).kernel)
        size = tuple(x.shape[-sides:]) if sides else ()
        channels = x.shape[-1] if not sides else x.shape[-sides - 1]
        self.places[path].append((x.numel() // max(1, channels * math.prod(size)), size))
