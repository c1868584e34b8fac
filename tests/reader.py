"""What the documentation takes for granted: the reader's own network, data and files, here as small as can be.

`namespace` is what the Python blocks of a page begin with. A name belongs here only if nobody could mistake it for
one of the package's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CLASSES, SIZE, SAMPLES = 4, 12, 64


class YourNet(nn.Module):
    """A stem and three layers, one of them residual, of images [N, 1, 12, 12]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = _convolution(1, width)
        self.layer1 = _convolution(width, width)
        self.layer2 = _convolution(width, 2 * width, stride=2)
        self.layer3 = _convolution(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer3(self.layer2(x + self.layer1(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class ResNet56(YourNet):
    """A teacher: the same, wider."""

    def __init__(self) -> None:
        super().__init__(24)


class YourModule(L.LightningModule):
    """An ordinary classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = YourNet(width)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val/acc", self.accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class YourData(L.LightningDataModule):
    """Noise with labels: what is learnt does not matter here."""

    def setup(self, stage: str) -> None:
        self.samples = TensorDataset(*samples())

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, batch_size=32)

    test_dataloader = val_dataloader


def samples() -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, SIZE, SIZE, generator=generator)
    return images, torch.arange(SAMPLES) % CLASSES


def namespace(folder: Path) -> dict[str, Any]:
    """The reader's names, anew; and files in the folder that they work in."""
    torch.manual_seed(0)
    images, labels = samples()
    torch.save({"state_dict": YourNet().state_dict()}, folder / "dense.ckpt")
    torch.save({"state_dict": ResNet56().state_dict()}, folder / "teacher.ckpt")
    return {
        "__name__": "your_script",
        "YourNet": YourNet,
        "YourModule": YourModule,
        "YourData": YourData,
        "ResNet56": ResNet56,
        "net": YourNet().eval(),
        "teacher_net": ResNet56().eval(),
        "your_module": YourModule(),
        "your_data": YourData(),
        "images": images,
        "labels": labels,
        "batch": images[:32],
    }


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = (nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(*layers)
