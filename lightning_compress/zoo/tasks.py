"""LightningModules that train the networks of the zoo, and any others of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn, optim
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ImageClassifier", "learning_rate_factor"]

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
ScheduleName = Literal["cosine", "step", "constant"]


class ImageClassifier(L.LightningModule):
    """Cross-entropy training of one network on batches of (images, labels).

    Logs `train/loss`, `val/loss`, `val/acc`, `test/loss` and `test/acc` (top-1, between 0 and 1).

    Args:
        net: from images [N, C, H, W] to logits [N, num_classes]; a `torch.compile`d one will do.
        num_classes: how many classes there are.
        lr: highest learning rate of the schedule.
        optimizer: "sgd" (with Nesterov momentum), "adam", "adamw" or "rmsprop".
        momentum: for "sgd" and "rmsprop".
        weight_decay: on every parameter, in the optimizer's own way.
        schedule: how the learning rate falls over the whole run: "cosine" to zero, in a "step" to a tenth after
            half and again after three quarters (as He et al. 2015 do on CIFAR), or not at all ("constant").
        warmup: fraction of the run in which the learning rate rises linearly from zero.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2015, arXiv 1512.00567);
            in training only.

    Raises:
        ValueError: an argument is out of its range, or an unknown optimizer or schedule.

    Example:
        >>> task = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10, lr=0.01)
        >>> task.hparams.lr
        0.01
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: ScheduleName = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_choice("optimizer", optimizer, get_args(OptimizerName))
        _check_choice("schedule", schedule, get_args(ScheduleName))
        _check_range("lr", lr, 0 < lr < math.inf, "above 0")
        _check_range("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _check_range("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or above")
        _check_range("warmup", warmup, 0 <= warmup < 1, "in [0, 1), a fraction of the run")
        _check_range("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the validation set."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the test set."""
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self.net(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{split}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{split}/acc", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the schedule over the steps that this run will take."""
        settings: Any = self.hparams
        optimizer = _optimizer(settings.optimizer, settings)(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            if settings.schedule == "constant" and not settings.warmup:
                return optimizer
            raise ValueError(
                "the learning rate's schedule needs to know how long the run is: give the Trainer `max_epochs` or "
                '`max_steps`, or the task schedule="constant" and warmup=0'
            )
        factor = partial(learning_rate_factor, steps=int(steps), schedule=settings.schedule, warmup=settings.warmup)
        schedule = optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int, steps: int, schedule: ScheduleName, warmup: float) -> float:
    """What the highest learning rate is multiplied by at one step of a run.

    Args:
        step: the step, from 0.
        steps: how many there are.
        schedule: "cosine" (Loshchilov and Hutter 2016, arXiv 1608.03983), "step" or "constant".
        warmup: fraction of the run in which the rate rises linearly, the first step being above zero.

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(learning_rate_factor(step, 8, "cosine", 0.25), 2) for step in range(9)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07, 0.0]
        >>> [learning_rate_factor(step, 4, "step", 0.0) for step in range(4)]
        [1.0, 1.0, 0.1, 0.01]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "cosine":
        # a finished run may be asked once more than it has steps
        progress = min(1.0, (step - rising) / max(1, steps - rising))
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 0.01 if step >= 0.75 * steps else 0.1 if step >= 0.5 * steps else 1.0
    return 1.0


def _optimizer(name: OptimizerName, settings: Any) -> Callable[[Iterable[nn.Parameter]], optim.Optimizer]:
    decay = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if name == "sgd":
        return partial(optim.SGD, **decay, momentum=settings.momentum, nesterov=settings.momentum > 0)
    if name == "rmsprop":
        return partial(optim.RMSprop, **decay, momentum=settings.momentum)
    return partial(optim.Adam if name == "adam" else optim.AdamW, **decay)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {value}")
