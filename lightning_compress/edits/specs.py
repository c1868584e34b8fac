"""Specifications: layers as plain data, so that an edit can say what it replaces and what it puts there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import layers, structured, tied
from lightning_compress.edits.structure import EditError

__all__ = ["Spec", "build", "describe", "frozen_spec", "show"]

Spec = Mapping[str, Any]
"""`type` and the arguments of its constructor; containers have the specs of their children under `layers`."""

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_STRUCTURED = ("kernel_size", "stride", "padding", "dilation", "groups")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_PLAIN: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: (*_CONV, "output_padding"),
    nn.ConvTranspose2d: (*_CONV, "output_padding"),
    nn.ConvTranspose3d: (*_CONV, "output_padding"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
    nn.Identity: (),
    nn.ChannelShuffle: ("groups",),
    tied.TiedConv2d: _CONV,
    layers.Reorder: ("channels",),
    layers.Rotated: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    structured.Circulant: ("in_channels", "out_channels", "block", *_STRUCTURED),
    structured.Hashed: ("in_channels", "out_channels", "values", "seed", *_STRUCTURED),
}
_BIASED = (nn.modules.conv._ConvNd, nn.Linear, layers.Rotated, structured.Structured)
_CONTAINERS: Mapping[type[nn.Module], str] = {layers.Chain: "Chain", layers.Concat: "Concat", layers.Sum: "Sum"}
_TYPES = {kind.__name__: kind for kind in (*_PLAIN, *_CONTAINERS)}


def describe(module: nn.Module) -> Spec | None:
    """The specification of a layer; None for one of another kind (a subclass is another kind).

    Example:
        >>> describe(nn.Linear(2, 3))
        {'type': 'Linear', 'in_features': 2, 'out_features': 3, 'bias': True}
        >>> describe(nn.ReLU()) is None
        True
    """
    kind = type(module)
    if kind in _CONTAINERS:
        children = [describe(child) for child in module.children()]
        form = {"form": module.form} if isinstance(module, layers.Chain) else {}
        return None if None in children else {"type": kind.__name__, **form, "layers": tuple(children)}
    if kind not in _PLAIN:
        return None
    spec: dict[str, Any] = {"type": kind.__name__}
    spec |= {name: _plain(getattr(module, name)) for name in _PLAIN[kind]}
    if isinstance(module, _BIASED):
        spec["bias"] = module.bias is not None
    return spec


def build(spec: Spec, like: Tensor) -> nn.Module:
    """A layer as specified, its parameters zero, where `like` is and of its dtype; a fake or meta `like` will do.

    Args:
        spec: the specification.
        like: a tensor.

    Raises:
        EditError: no such type of layer, or arguments that it does not take.
    """
    with torch.device("meta"):
        module = _construct(spec)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(like.new_zeros(parameter.shape))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                dtype = buffer.dtype if not buffer.is_floating_point() else like.dtype
                part._buffers[name] = like.new_zeros(buffer.shape, dtype=dtype)
        if isinstance(part, structured.Hashed):
            part.derive()
    return module


def _construct(spec: Spec) -> nn.Module:
    spec = dict(spec)
    name = spec.pop("type", None)
    kind = _TYPES.get(name)
    if kind is None:
        raise EditError(f"unknown type of layer {name!r}; known: {', '.join(sorted(_TYPES))}")
    try:
        if kind is layers.Chain:
            return layers.Chain(*(_construct(child) for child in spec["layers"]), form=spec["form"])
        if kind in _CONTAINERS:
            return kind([_construct(child) for child in spec["layers"]])
        return kind(**spec)
    except (TypeError, ValueError, KeyError) as error:
        raise EditError(f"a {name} cannot be made of {spec}: {error}") from error


def frozen_spec(data: Mapping[str, Any]) -> Spec:
    """A specification read from JSON, whose lists are the tuples that `describe` gives."""
    return {
        name: tuple(frozen_spec(child) for child in value) if name == "layers" else _plain(value)
        for name, value in data.items()
    }


def show(spec: Spec | None) -> str:
    """A specification in a few words.

    Example:
        >>> show(describe(nn.Conv2d(3, 8, 5, padding=2)))
        'Conv2d(3, 8, 5x5)'
    """
    if spec is None:
        return "a layer of another kind"
    if "layers" in spec:
        return f"{spec['type']}({', '.join(show(child) for child in spec['layers'])})"
    sizes = [spec[name] for name in ("in_channels", "out_channels", "in_features", "out_features") if name in spec]
    kernel = ["x".join(str(side) for side in spec["kernel_size"])] if spec.get("kernel_size") else []
    return f"{spec['type']}({', '.join(map(str, [*sizes, *kernel]))})"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
