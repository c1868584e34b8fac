"""Pictures: filters, whatever the layer has become, and reconstructions, as images that one can look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import Chain, Rotated
from lightning_compress.structured import Structured
from lightning_compress.tied import transpose

__all__ = ["draw", "filters_of", "pixels", "stack", "tile"]

GAP = 1
SCALE = 4


def draw(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What there is to be seen of a network.

    Args:
        network: the network, in evaluation mode.
        images: [N, C, H, W].

    Returns:
        `filters` of the first layer that takes images of so many channels, [outputs, C, h, w]; `reconstructions`,
        [N, C, H, W], if the network gives a `reconstruction`; what there is not is left out.
    """
    drawn: dict[str, Tensor] = {}
    channels = images.shape[1]
    layer = next((part for part in network.modules() if _takes_images(part, channels)), None)
    if layer is not None:
        drawn["filters"] = filters_of(layer, channels)
    with torch.no_grad():
        reconstruction = getattr(network(images), "reconstruction", None)
    if isinstance(reconstruction, Tensor):
        drawn["reconstructions"] = reconstruction
    return drawn


def filters_of(layer: nn.Module, channels: int) -> Tensor:
    """The filters of a layer: what its transpose makes of one output pixel after the other.

    Args:
        layer: a convolution, or what replaced one.
        channels: that it takes.

    Returns:
        [outputs, channels, H, W], the sides cropped to where any filter is not zero.

    Example:
        >>> layer = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        >>> torch.equal(filters_of(layer, 1), layer.weight)
        True
    """
    sizes: list[tuple[Any, Any, Any]] = [
        (part.kernel_size, part.dilation, part.stride) for part in layer.modules() if hasattr(part, "kernel_size")
    ]
    reach = sum(max(kernel) * max(dilation) for kernel, dilation, _ in sizes)
    wide = (2 * reach + 1) * max(max(stride) for _, _, stride in sizes)
    with torch.no_grad():
        outputs, height, width = layer(next(layer.parameters()).new_zeros(1, channels, wide, wide)).shape[1:]
        pixels = next(layer.parameters()).new_zeros(outputs, outputs, height, width)
        pixels[range(outputs), range(outputs), height // 2, width // 2] = 1
        filters = transpose(layer, pixels)
    lines, columns = (filters.abs().amax((0, 1, axis)).nonzero().flatten().tolist() for axis in (3, 2))
    if not lines:  # all of them are zero
        return filters[:, :, :1, :1]
    return filters[:, :, lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]


def tile(images: Tensor, columns: int | None = None) -> Tensor:
    """Images side by side, each between its own least and greatest value.

    Args:
        images: [N, C, H, W]; of other than three channels the mean is drawn, in gray.
        columns: how many in a row; by default as many as make a square.

    Returns:
        One image, [3, H', W'], values in [0, 1].
    """
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    count, _, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp_min(1e-12)
    sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + GAP), (number % columns) * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def stack(sheets: list[Tensor], dim: int) -> Tensor:
    """Sheets in a row (dim 1) or one below the other (dim 0), with white between and where one is smaller.

    Args:
        sheets: [3, H, W] each, of any sides.
        dim: 0 or 1.

    Returns:
        One image, [3, H', W'].
    """
    height, width = (max(sheet.shape[axis] for sheet in sheets) for axis in (1, 2))
    parts: list[Tensor] = []
    for sheet in sheets:
        room = torch.ones(3, height if dim == 1 else sheet.shape[1], width if dim == 0 else sheet.shape[2])
        room[:, : sheet.shape[1], : sheet.shape[2]] = sheet
        shape = (3, room.shape[1], 4 * GAP) if dim == 1 else (3, 2 * GAP, room.shape[2])
        parts += [room, torch.ones(shape)]
    return torch.cat(parts[:-1], 1 + dim)


def pixels(sheet: Tensor) -> Tensor:
    """A sheet as bytes, [H, W, 3], each of its pixels drawn large."""
    large = sheet.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    return large.mul(255).round().to(torch.uint8).permute(1, 2, 0)


def _takes_images(part: nn.Module, channels: int) -> bool:
    """Whether a layer is a convolution, or stands for one, on images of so many channels."""
    if isinstance(part, Chain):
        return len(part) > 0 and _takes_images(part[0], channels)
    if isinstance(part, nn.Conv2d | Rotated) or (isinstance(part, Structured) and len(part.kernel_size) == 2):
        return int(part.in_channels) == channels
    return False
