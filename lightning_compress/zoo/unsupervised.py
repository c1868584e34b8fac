"""LightningModules for networks that learn a representation without labels, and are judged by a linear probe too."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.zoo.optimization import OptimizerName, ScheduleName, check_optimization, make_optimizer
from lightning_compress.zoo.representations import Representation

__all__ = ["PSNR", "ContrastiveDivergence", "ImageReconstruction"]


FIGURES = ("acc", "mse", "psnr", "active")


class PSNR(Metric):
    """Peak signal-to-noise ratio, in dB, of images whose range nobody has told: it is that of the targets.

    Normalised images have other ranges than [0, 1]; torchmetrics' own metric wants theirs given.

    Example:
        >>> metric = PSNR()
        >>> metric.update(torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 3.0]))
        >>> round(float(metric.compute()), 2)
        12.04
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    low: Tensor
    high: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("low", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-math.inf), dist_reduce_fx="max")
        self.add_state("squares", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, images: Tensor) -> None:
        """Add images of any shape, and what was made of them."""
        self.low = torch.minimum(self.low, images.min())
        self.high = torch.maximum(self.high, images.max())
        self.squares += (reconstruction - images).square().sum()
        self.count += images.numel()

    def compute(self) -> Tensor:
        """In decibels."""
        return 10 * torch.log10((self.high - self.low).square() * self.count / self.squares)


class _Unsupervised(L.LightningModule):
    """What both tasks share: the figures of evaluation, and the optimizer."""

    net: nn.Module

    def _begin(self, net: nn.Module, num_classes: int) -> None:
        check_optimization(self.hparams)
        self.net = net
        for split in ("val", "test"):  # as attributes, so that Lightning resets and moves them
            metrics = {
                "acc": MulticlassAccuracy(num_classes, average="micro"),
                "mse": MeanSquaredError(),
                "psnr": PSNR(),
                "active": MeanMetric(),
            }
            for name, metric in metrics.items():
                setattr(self, f"{split}_{name}", metric)

    def forward(self, x: Tensor) -> Representation:
        """What the network makes of images [N, C, H, W]."""
        return represent(self.net, x)

    def on_validation_epoch_start(self) -> None:
        """Start anew: what `trainer.validate` resets after itself are tensors that training may not write to."""
        for name in FIGURES:
            getattr(self, f"val_{name}").reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log how images of the validation set are classified and reconstructed."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log how images of the test set are classified and reconstructed."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        found = self(images)
        size = len(labels)
        getattr(self, f"{split}_acc").update(found.logits, labels)
        getattr(self, f"{split}_mse").update(found.reconstruction.contiguous(), images.contiguous())
        getattr(self, f"{split}_psnr").update(found.reconstruction, images)
        getattr(self, f"{split}_active").update(found.active)
        self.log(f"{split}/loss", found.losses.mean(0).sum(), batch_size=size, sync_dist=True)
        for name in FIGURES:
            self.log(f"{split}/{name}", getattr(self, f"{split}_{name}"), batch_size=size, prog_bar=name == "acc")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the schedule over the steps that this run will take."""
        return make_optimizer(self)

    def _log_training(self, found: Representation, loss: Tensor) -> None:
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(found.logits), sync_dist=True)


class ImageReconstruction(_Unsupervised):
    """Training by what each layer of a network is to make small, and by the reconstruction of the images.

    The loss is the sum of `losses`, `reconstruction` times the mean squared error of the images, and the probe's
    cross-entropy. Logs `train/loss` and, for `val` and `test`, `loss` (the sum of `losses`), `acc` (top-1 of the
    probe), `mse`, `psnr` (in dB, over the range of the images) and `active` (units of the top code that are on).

    Args:
        net: from images [N, C, H, W] to a `Representation`.
        num_classes: how many classes there are.
        reconstruction: weight of the images' error, against the layers' own losses.
        lr: highest learning rate; this and the rest as for `ImageClassifier`.
        optimizer: its name.
        momentum: for "sgd" and "rmsprop".
        weight_decay: on every parameter.
        schedule: how the learning rate falls.
        warmup: fraction of the run in which it rises.

    Raises:
        ValueError: an argument is out of its range, or an unknown optimizer or schedule.

    Example:
        >>> from lightning_compress.zoo import StackedConvAutoencoder
        >>> task = ImageReconstruction(StackedConvAutoencoder(image_size=8), num_classes=10)
        >>> task(torch.rand(2, 1, 8, 8)).reconstruction.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        reconstruction: float = 1.0,
        lr: float = 2e-3,
        optimizer: OptimizerName = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: ScheduleName = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self._begin(net, num_classes)
        if not 0 <= reconstruction < math.inf:
            raise ValueError(f"`reconstruction` must be 0 or above, got {reconstruction}")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        found = self(images)
        loss: Tensor = found.losses.mean(0).sum() + F.cross_entropy(found.logits, labels)
        loss = loss + self.hparams["reconstruction"] * F.mse_loss(found.reconstruction, images)
        self._log_training(found, loss)
        return loss


class ContrastiveDivergence(_Unsupervised):
    """Training of a belief network by contrastive divergence, with a linear probe; optimization is manual.

    Hinton 2002, 'Training products of experts by minimizing contrastive divergence' (Neural Computation 14).

    The network's `losses` are free energies of data over those of samples (see `ConvolutionalRBM.loss`); their sum and
    the probe's cross-entropy are lowered. Logs what `ImageReconstruction` logs; `loss` is the gap of free energies.

    Args:
        net: from images [N, C, H, W] to a `Representation`.
        num_classes: how many classes there are.
        lr: highest learning rate; this and the rest as for `ImageClassifier`.
        optimizer: its name.
        momentum: for "sgd" and "rmsprop".
        weight_decay: on every parameter.
        schedule: how the learning rate falls.
        warmup: fraction of the run in which it rises.

    Raises:
        ValueError: an argument is out of its range, or an unknown optimizer or schedule.

    Example:
        >>> from lightning_compress.zoo import ConvolutionalDBN
        >>> ContrastiveDivergence(ConvolutionalDBN(image_size=8), num_classes=10).automatic_optimization
        False
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 2e-3,
        optimizer: OptimizerName = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: ScheduleName = "cosine",
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self._begin(net, num_classes)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step of contrastive divergence."""
        images, labels = batch
        optimizer, schedule = cast(LightningOptimizer, self.optimizers()), self.lr_schedulers()
        found = self(images)
        loss: Tensor = found.losses.mean(0).sum() + F.cross_entropy(found.logits, labels)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if isinstance(schedule, LRScheduler):
            schedule.step()
        self._log_training(found, loss.detach())


def represent(net: nn.Module, images: Tensor) -> Representation:
    """What a network gives, a deployed one too, which has no names for its outputs.

    Raises:
        MisconfigurationException: it gives something else.
    """
    found = net(images)
    if not isinstance(found, tuple) or len(found) != len(Representation._fields):
        raise MisconfigurationException(
            f"{type(net).__name__} gives a {type(found).__name__}, and no Representation ("
            f"{', '.join(Representation._fields)}); networks that give logits are trained by ImageClassifier "
            "(task=classification)"
        )
    return Representation(*found)
