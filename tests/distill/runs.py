"""Runs for distillation: the same step with the teacher written into it by hand, and without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distill.losses import KD
from tests.contract.nets import NETS
from tests.contract.runs import data, trainer

EPOCHS = 2


def teacher() -> nn.Module:
    """A network whose answers differ from the student's; in training mode, as a careless user leaves it."""
    torch.manual_seed(7)
    net = NETS["residual"]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
        net(torch.randn(32, 1, 8, 8))
    return net


class Student(L.LightningModule):
    """An ordinary module; `hand` is a teacher that its step uses itself."""

    def __init__(self, hand: nn.Module | None = None, net: str = "plain", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net: Any = NETS[net]()
        self.options = {"mixup": False, "dict": False, "compile": False, "manual": False, **options}
        if self.options["compile"]:
            self.net = torch.compile(self.net, backend="aot_eager")
        self.hand = [hand] if hand is not None else []  # a list hides it from the module tree
        self.automatic_optimization = not self.options["manual"]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        if self.options["mixup"]:
            x = 0.7 * x + 0.3 * x[torch.randperm(len(x))]
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log("task", loss)
        if self.hand:
            with torch.no_grad():
                answers = self.hand[0].eval()(x)
            loss = 0.3 * loss + 0.7 * KD(temperature=3.0)(logits, answers)
        if self.options["manual"]:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "extra": y} if self.options["dict"] else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def run(module: L.LightningModule, folder: Path, *callbacks: L.Callback, ckpt: Any = None, **options: Any) -> L.Trainer:
    """Train on the contract's data, always from the same random state."""
    torch.manual_seed(3)
    running = trainer(folder, *callbacks, **({"max_epochs": EPOCHS} | options))
    running.fit(module, data(), data(), ckpt_path=ckpt, weights_only=True)
    return running


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, as they are now."""
    return {name: value.clone() for name, value in copy.copy(module.state_dict()).items()}
