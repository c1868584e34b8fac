"""LightningModules that train the networks of the zoo, and any others of the same kind."""

from __future__ import annotations

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.zoo.optimization import OptimizerName, ScheduleName, check_optimization, make_optimizer

__all__ = ["ImageClassifier"]


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
        self.save_hyperparameters(ignore=["net"])
        check_optimization(self.hparams)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}")
        self.net = net
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W].

        Raises:
            MisconfigurationException: the network gives something else.
        """
        logits: Tensor = self.net(x)
        if not isinstance(logits, Tensor):
            raise MisconfigurationException(
                f"{type(self.net).__name__} gives a {type(logits).__name__}, and no tensor of logits; networks that "
                "give a Representation are trained by ImageReconstruction or ContrastiveDivergence (their arch chooses "
                "the task, if none is named)"
            )
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.hparams["label_smoothing"])
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
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{split}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{split}/acc", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the schedule over the steps that this run will take."""
        return make_optimizer(self)
