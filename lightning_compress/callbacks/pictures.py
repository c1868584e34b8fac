"""Pictures of filters and of reconstructions, dense and compressed side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor, nn

from lightning_compress.callbacks.capture import capture
from lightning_compress.edits import skeleton
from lightning_compress.layers import Chain, Rotated
from lightning_compress.quiet import undisturbed, without_observers
from lightning_compress.structured import Structured
from lightning_compress.tied import transpose

__all__ = ["FilterPictures", "filters_of", "tile"]

GAP = 1
SCALE = 4


class FilterPictures(pl.Callback):
    """Draw the first layer's filters, and what the network reconstructs, before the first edit and after training.

    Writes `filters.png` and, of a network that gives a `reconstruction`, `reconstructions.png` (images, then what the
    dense and the compressed network make of them, row by row), and logs both to TensorBoard and W&B where a run has
    them. Of a chain of low rank, or compact filters, the filters that they stand for are drawn. Training goes on as if
    nobody looked.

    Args:
        folder: where the files go.
        images: how many are reconstructed.
        network: dotted name of the network in the LightningModule; by default its only child with parameters.

    Raises:
        ValueError: fewer than one image.

    Example:
        >>> FilterPictures("pictures", images=4).images
        4
    """

    def __init__(
        self, folder: str | os.PathLike[str] = "pictures", images: int = 8, network: str | None = None
    ) -> None:
        """Check the arguments."""
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise ValueError(f"`images` must be an integer of at least 1, got {images!r}")
        self.folder, self.images, self.network = Path(folder), images, network
        self._dense: dict[str, Tensor] = {}
        self._seen: Tensor | None = None
        self._path = ""
        self._edited = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose images, and draw the network as training finds it."""
        captured = capture(trainer, pl_module, self.network, samples=self.images)
        inputs = [leaf for call in captured.calibration for leaf in call.tensors()]
        self._path = captured.path
        self._seen = torch.cat([x for x in inputs if x.shape[1:] == inputs[0].shape[1:]])[: self.images]
        self._dense = self._draw(captured.network)

    def before_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network_path: str) -> None:
        """Draw the dense network as it is before its first edit."""
        network = pl_module.get_submodule(network_path)
        if network_path == self._path and not self._edited:
            self._dense, self._edited = self._draw(network), True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what has become of it, and write all."""
        self._edited = False
        if self._seen is None or not trainer.is_global_zero:
            return
        after = self._draw(pl_module.get_submodule(self._path))
        pictures: dict[str, Tensor] = {}
        if "filters" in after:
            pictures["filters"] = _stack([tile(side["filters"]) for side in (self._dense, after)], dim=1)
        if "reconstructions" in after:
            rows = (self._seen, self._dense["reconstructions"], after["reconstructions"])
            pictures["reconstructions"] = _stack([tile(_colours(row.cpu(), 3), len(row)) for row in rows], dim=0)
        self._write(trainer, pictures)

    def _draw(self, network: nn.Module) -> dict[str, Tensor]:
        assert self._seen is not None
        with without_observers(network):
            still = skeleton(network, lambda tensor: tensor.detach().clone())
        drawn: dict[str, Tensor] = {}
        with torch.no_grad(), undisturbed(still):
            still.eval()
            channels = self._seen.shape[1]
            layer = next((part for part in still.modules() if _takes_images(part, channels)), None)
            if layer is not None:
                drawn["filters"] = _colours(filters_of(layer, channels).cpu(), 3)
            reconstruction = getattr(still(self._seen), "reconstruction", None)
            if isinstance(reconstruction, Tensor):
                drawn["reconstructions"] = reconstruction.cpu()
        return drawn

    def _write(self, trainer: pl.Trainer, pictures: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            pixels = picture.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
            array = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            image = Image.fromarray(array)
            image.save(self.folder / f"{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"compress/{name}", array, trainer.global_step, dataformats="HWC")
                elif isinstance(logger, WandbLogger):
                    logger.log_image(f"compress/{name}", [image])


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
        images: [N, 3, H, W].
        columns: how many in a row; by default as many as make a square.

    Returns:
        One image, [3, H', W'], values in [0, 1].
    """
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


def _colours(images: Tensor, channels: int) -> Tensor:
    """Gray images in three equal colours; of other numbers of channels their mean."""
    return images if images.shape[1] == channels else images.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def _stack(sheets: list[Tensor], dim: int) -> Tensor:
    """Sheets in a row (dim 1) or one below the other (dim 0), with white between and where one is smaller."""
    height, width = (max(sheet.shape[axis] for sheet in sheets) for axis in (1, 2))
    parts: list[Tensor] = []
    for sheet in sheets:
        room = torch.ones(3, height if dim == 1 else sheet.shape[1], width if dim == 0 else sheet.shape[2])
        room[:, : sheet.shape[1], : sheet.shape[2]] = sheet
        shape = (3, room.shape[1], 4 * GAP) if dim == 1 else (3, 2 * GAP, room.shape[2])
        parts += [room, torch.ones(shape)]
    return torch.cat(parts[:-1], 1 + dim)


def _takes_images(part: nn.Module, channels: int) -> bool:
    """Whether a layer is a convolution, or stands for one, on images of so many channels."""
    if isinstance(part, Chain):
        return len(part) > 0 and _takes_images(part[0], channels)
    if isinstance(part, nn.Conv2d | Rotated) or (isinstance(part, Structured) and len(part.kernel_size) == 2):
        return int(part.in_channels) == channels
    return False
