"""Layers that work in both directions: up as they are, down as their transpose, with the same weights.

Networks that infer and generate with one set of filters (deconvolutional networks, autoencoders with tied weights,
belief networks) call a layer upward as `layer(x)` and downward as `layer(z, transposed=True)`. Whatever replaces the
layer, a chain of low rank or compact filters, is transposed as a whole: both directions share what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TiedConv2d", "Transposable", "transpose", "transpose_convolution"]

_BACK: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@runtime_checkable
class Transposable(Protocol):
    """A layer that knows its transpose."""

    def transpose(self, z: Tensor) -> Tensor:
        """The transpose of what the layer multiplies by; its bias has no part in it."""
        ...


class TiedConv2d(nn.Conv2d):
    """A convolution that is also called as its transpose, with the same weight.

    For every image x and code z, `(layer(x) * z).sum() == (x * layer(z, transposed=True)).sum()`, but for the bias,
    which has no part in the transpose. With a stride, downward sides are `stride` times upward ones.

    Args:
        args: those of `nn.Conv2d`; zeros around only.
        kwargs: likewise.

    Raises:
        ValueError: another padding mode.

    Example:
        >>> import torch
        >>> layer = TiedConv2d(1, 8, 3, padding=1, bias=False)
        >>> code = layer(torch.zeros(2, 1, 6, 6))
        >>> code.shape, layer(code, transposed=True).shape
        (torch.Size([2, 8, 6, 6]), torch.Size([2, 1, 6, 6]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f'`padding_mode` of a tied convolution must be "zeros", got {self.padding_mode!r}')

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Upward, from [N, in, H, W] to [N, out, H', W'], or, if `transposed`, the other way."""
        return transpose(self, x) if transposed else super().forward(x)


def transpose(layer: nn.Module, z: Tensor) -> Tensor:
    """The transpose of what a linear layer multiplies by, without its bias.

    Args:
        layer: a convolution, a linear layer, or a container of such.
        z: what has the shape of its outputs.

    Returns:
        What has the shape of its inputs.

    Raises:
        TypeError: a layer that is not linear, or not known.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 2)
        >>> torch.equal(transpose(layer, torch.eye(2)), layer.weight)
        True
    """
    if isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
        return transpose_convolution(z, layer.weight, layer)
    if isinstance(layer, nn.Linear):
        return F.linear(z, layer.weight.T)
    if isinstance(layer, nn.Identity):
        return z
    if isinstance(layer, nn.ChannelShuffle):  # of g x n channels it makes n x g
        blocks: Tensor = z.unflatten(1, (-1, layer.groups))
        return blocks.transpose(1, 2).flatten(1, 2)
    if isinstance(layer, Transposable):
        return layer.transpose(z)
    raise TypeError(f"a {type(layer).__name__} has no transpose: only linear layers have")


def transpose_convolution(z: Tensor, weight: Tensor, layer: Any) -> Tensor:
    """The transpose of a convolution.

    Args:
        z: [N, out, *size].
        weight: [out, in / groups, *kernel].
        layer: has the stride, padding, dilation and groups.
    """
    spans = [step * (side - 1) for step, side in zip(layer.dilation, weight.shape[2:], strict=True)]
    same = layer.padding == "same"  # without a stride, and of even sides with one pixel more at one end: cut off below
    padding = [0] * len(spans) if isinstance(layer.padding, str) else layer.padding
    # of the sides that give the same outputs: that which the stride divides
    room = [(2 * pad - span - 1) % by for pad, span, by in zip(padding, spans, layer.stride, strict=True)]
    back = _BACK[len(spans)]
    x: Tensor = back(z, weight, None, layer.stride, padding, room, layer.groups, layer.dilation)
    for axis, span in enumerate(spans if same else ()):
        x = x.narrow(2 + axis, span // 2, z.shape[2 + axis])
    return x
