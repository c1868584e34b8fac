"""Ordinary Lightning runs for the contract: the module knows nothing of compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tests.contract.nets import ALL

EPOCHS = 5
SAMPLES = 64


class Task(L.LightningModule):
    """Classifies; calls its network only inside of its steps."""

    def __init__(self, net: nn.Module, optimizer: str = "Adam", **options: Any) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.options = optimizer, options or {"lr": 0.01}
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Metrics(L.Callback):
    """Every epoch's figures and learning rate."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows[trainer.current_epoch] = {**{k: v.item() for k, v in trainer.callback_metrics.items()}, "lr": rate}


def data(batch: int = 16) -> DataLoader[Any]:
    """Four classes of noisy 8 x 8 images, in a fixed order: Lightning does not store the shuffler's state."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    x = patterns[y] + 0.5 * torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def task(net: str, **options: Any) -> Task:
    """The same module every time."""
    torch.manual_seed(1)
    return Task(ALL[net](), **options)


def trainer(folder: Path, *callbacks: L.Callback, monitor: str | None = "val_loss", **options: Any) -> L.Trainer:
    """A quiet Trainer that saves a checkpoint after every epoch."""
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1} | options
    saving = ModelCheckpoint(folder, "{epoch}", monitor=monitor, save_top_k=-1, save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=[*callbacks, saving], default_root_dir=folder, **(quiet | settings))


def fit(module: Task, folder: Path, *callbacks: L.Callback, ckpt: Path | None = None, **options: Any) -> L.Trainer:
    """Train; `weights_only` loading forbids pickled objects in checkpoints."""
    running = trainer(folder, *callbacks, **options)
    running.fit(module, data(), data(), ckpt_path=ckpt, weights_only=True)
    return running
