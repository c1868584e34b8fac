"""Pictures: what they show, where they go, and that training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn

from lightning_compress import Budget, ChannelPruning, FilterPictures, LowRankFactorization
from lightning_compress.layers import Chain, Concat
from lightning_compress.pictures import filters_of, tile
from lightning_compress.zoo import Digits, ImageClassifier, ImageReconstruction, LeNet5, StackedConvAutoencoder


def fit(
    module: L.LightningModule, *callbacks: L.Callback, logger: Any = False, epochs: int = 2, **how: Any
) -> L.LightningModule:
    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=saves,
        **quiet,
    )
    trainer.fit(module, Digits(limit_train=128), **how)
    return module


def autoencoder() -> ImageReconstruction:
    L.seed_everything(0, verbose=False)
    return ImageReconstruction(StackedConvAutoencoder(1, 10, 8, codes=(8, 12)), 10)


PRUNING = {"start": 1, "end": 1, "steps": 1, "samples": 32}


def test_filters_and_reconstructions_are_drawn_dense_and_compressed(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path), WandbLogger(save_dir=tmp_path, offline=True, project="pictures")]
    pictures = FilterPictures(tmp_path / "pictures", images=5)
    fit(autoencoder(), ChannelPruning(Budget(macs=0.5), **PRUNING), pictures, logger=loggers)  # type: ignore[arg-type]
    loggers[1].experiment.finish()
    filters = np.asarray(Image.open(tmp_path / "pictures" / "filters.png"))
    rows = np.asarray(Image.open(tmp_path / "pictures" / "reconstructions.png"))
    assert filters.std() > 10
    # three rows of five images of 8 px with a gap of 1 between, rows 2 apart, four times as large
    assert rows.shape == (4 * (3 * 8 + 2 * 2), 4 * (5 * 9 - 1), 3)
    images, dense, compressed = (rows[4 * 10 * row : 4 * (10 * row + 8)].astype(float) for row in range(3))
    assert np.abs(dense - compressed).mean() > 0
    assert np.corrcoef(images.ravel(), dense.ravel())[0, 1] > 0.3
    assert list(tmp_path.glob("lightning_logs/**/events*"))
    assert {path.name.partition("_")[0] for path in tmp_path.rglob("media/images/compress/*.png")} == {
        "filters",
        "reconstructions",
    }


def test_training_does_not_notice(tmp_path: Path) -> None:
    plain = fit(autoencoder(), ChannelPruning(Budget(macs=0.5), **PRUNING))  # type: ignore[arg-type]
    drawn = fit(
        autoencoder(),
        ChannelPruning(Budget(macs=0.5), **PRUNING),
        FilterPictures(tmp_path),  # type: ignore[arg-type]
    )
    state = drawn.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_network_that_reconstructs_nothing_has_filters_only(tmp_path: Path) -> None:
    fit(
        ImageClassifier(LeNet5(image_size=8), 10, lr=0.01),
        LowRankFactorization(Budget(macs=0.7), start=1, end=1, samples=32),
        FilterPictures(tmp_path),
    )
    assert [file.name for file in tmp_path.iterdir()] == ["filters.png"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3),
        nn.Conv2d(2, 4, 5, stride=2, padding=2),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, groups=2),
    ],
)
def test_filters_of_a_convolution_are_its_weights(layer: nn.Conv2d) -> None:
    found = filters_of(layer, 2)
    if layer.groups == 1:
        assert torch.equal(found, layer.weight)
    else:
        assert torch.equal(found[:2, :1], layer.weight[:2])
        assert not found[:2, 1:].any()


def test_filters_of_a_chain_are_those_that_it_stands_for() -> None:
    column, row = nn.Conv2d(1, 2, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(2, 4, (1, 3), padding=(0, 1))
    expected = torch.einsum("rikx,oryl->oikl", column.weight, row.weight)
    assert torch.allclose(filters_of(Chain(column, row), 1), expected, atol=1e-6)
    first, depthwise = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1, groups=3)
    found = filters_of(Chain(first, Concat([nn.Identity(), depthwise])), 1)
    assert torch.allclose(found[:3], first.weight)
    assert torch.allclose(found[3:], first.weight * depthwise.weight)


def test_pruned_filters_are_drawn_too() -> None:
    layer = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(layer.weight)
    assert filters_of(layer, 1).shape == (2, 1, 1, 1)
    sheet = tile(torch.rand(5, 3, 2, 2))
    assert sheet.shape == (3, 3 * 3 - 1, 2 * 3 - 1)
    assert sheet.min() >= 0
    assert sheet.max() <= 1


def test_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    """It finds a network that is cut already, and remembers what it was."""
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [ChannelPruning(Budget(macs=0.5), **PRUNING), FilterPictures(tmp_path / "a")]  # type: ignore[arg-type]
    fit(autoencoder(), *callbacks, saving, epochs=3)
    callbacks = [ChannelPruning(Budget(macs=0.5), **PRUNING), FilterPictures(tmp_path / "b")]  # type: ignore[arg-type]
    fit(autoencoder(), *callbacks, epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    for name in ("filters.png", "reconstructions.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_network_that_is_not_called_with_images_is_refused_before_training(tmp_path: Path) -> None:
    class Flat(ImageClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """None."""

    with pytest.raises(MisconfigurationException, match=r"with a batch of images .*pictures=null"):
        fit(Flat(nn.Linear(64, 10), 10), FilterPictures(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="`images` must be an integer of at least 1, got 0"):
        FilterPictures(images=0)
