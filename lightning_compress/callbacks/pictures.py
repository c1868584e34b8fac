"""Pictures of filters and of reconstructions, dense and compressed side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor, nn

from lightning_compress.callbacks.capture import capture
from lightning_compress.callbacks.logs import log_picture
from lightning_compress.edits import history, skeleton
from lightning_compress.pictures import draw, pixels, stack, tile
from lightning_compress.quiet import without_observers

__all__ = ["FilterPictures"]


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
        self._images: Tensor | None = None
        self._path = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the network of an earlier fit."""
        if stage == "fit":
            self._dense, self._images = {}, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose images, and draw the network as it is when dense; a resumed run remembers how it was.

        Raises:
            MisconfigurationException: the network is called otherwise than with one batch of images.
        """
        captured = capture(trainer, pl_module, self.network, samples=self.images)
        inputs = [call.tensors() for call in captured.calibration]
        if len(captured.calls) != 1 or captured.calls[0].path or any([x.dim() for x in row] != [4] for row in inputs):
            raise MisconfigurationException(
                "FilterPictures draws networks that a training step calls once, with a batch of images [N, C, H, W] "
                "and nothing else; leave it out of this run (pictures=null)"
            )
        self._path = captured.path
        self._images = torch.cat([row[0].detach().float().cpu() for row in inputs])[: self.images]
        if not history(captured.network):
            self._dense = self._draw(captured.network)

    def before_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network_path: str) -> None:
        """Draw the dense network as it is before its first edit."""
        network = pl_module.get_submodule(network_path)
        if network_path == self._path and not history(network):
            self._dense = self._draw(network)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what has become of it, and write all."""
        if self._images is None or not trainer.is_global_zero:
            return
        sides = [side for side in (self._dense, self._draw(pl_module.get_submodule(self._path))) if side]
        filters = [tile(side["filters"]) for side in sides if "filters" in side]
        rows = [tile(side["reconstructions"], self.images) for side in sides if "reconstructions" in side]
        if filters:
            self._write(trainer, "filters", stack(filters, dim=1))
        if rows:
            self._write(trainer, "reconstructions", stack([tile(self._images, self.images), *rows], dim=0))

    def state_dict(self) -> dict[str, Any]:
        """How the dense network looked: a resumed run no longer has it."""
        return {"dense": dict(self._dense)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._dense = dict(state_dict["dense"])

    def _draw(self, network: nn.Module) -> dict[str, Tensor]:
        """Off a copy on the CPU, in single precision: the network in training is left alone."""
        assert self._images is not None
        with without_observers(network):
            copy = skeleton(network, lambda tensor: tensor.detach().cpu().clone()).float().eval()
        with isolate_rng():
            return draw(copy, self._images)

    def _write(self, trainer: pl.Trainer, name: str, sheet: Tensor) -> None:
        image = Image.fromarray(pixels(sheet).numpy())
        self.folder.mkdir(parents=True, exist_ok=True)
        image.save(self.folder / f"{name}.png")
        log_picture(trainer, name, image)
