"""A LightningModule for classifiers that learn from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.distill.teachers import Teacher
from lightning_compress.distill.terms import Loss, Term
from lightning_compress.edits import skeleton
from lightning_compress.quiet import without_observers

__all__ = ["DistillationModule", "classifier_step"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class DistillationModule(L.LightningModule):
    """Trains a student on batches of (inputs, labels) and on a teacher, for those who have no LightningModule yet.

    It is an ordinary classifier that brings its own `Distillation` callback: the teacher and the projectors live there,
    so that checkpoints and `parameters()` hold the student alone. Logs `train/loss`, `val/loss`, `val/acc`,
    `test/loss`, `test/acc` and what `Distillation` logs.

    Args:
        student: from inputs to logits [N, classes].
        teacher: as for `Distillation`.
        losses: as for `Distillation`.
        task_loss: called as `task_loss(logits, labels)`; by default cross-entropy.
        task_weight: factor on it.
        optimizer: makes the optimizer from parameters; by default AdamW at a rate of 1e-3.
        scheduler: makes a learning rate scheduler, stepped after each epoch, from the optimizer; None: a constant rate.
        cache: as for `Distillation`.

    Example:
        >>> from lightning_compress.distill.losses import KD
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
        >>> module = DistillationModule(nets[0], nets[1], {"kd": KD(temperature=2.0)})
        >>> sorted(module.state_dict())
        ['student.1.bias', 'student.1.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | str | Path | Sequence[nn.Module | Teacher | str | Path],
        losses: Loss | Term | Mapping[str, Loss | Term] | None = None,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        task_weight: float = 1.0,
        optimizer: MakeOptimizer | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.task_loss = nn.CrossEntropyLoss() if task_loss is None else task_loss
        self.optimizer = partial(optim.AdamW, lr=1e-3) if optimizer is None else optimizer
        self.scheduler = scheduler
        # In a tuple: a callback holds no module that PyTorch should find.
        self._callbacks = (Distillation(teacher, losses, task_weight, student="student", cache=cache),)

    def configure_callbacks(self) -> list[L.Callback]:
        """The callback that does the teaching."""
        return list(self._callbacks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of the student."""
        logits: Tensor = self.student(x)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The task's loss; the callback adds the teacher's."""
        return classifier_step(self, self.student, self.task_loss, batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        classifier_step(self, self.student, self.task_loss, batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        classifier_step(self, self.student, self.task_loss, batch, "test")

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule if there is one."""
        made = self.optimizer(self.parameters())
        return made if self.scheduler is None else ([made], [self.scheduler(made)])

    def export(self) -> nn.Module:
        """A copy of the student alone: no hooks, no teacher, on the CPU, in evaluation mode."""
        student = getattr(self.student, "_orig_mod", self.student)
        with without_observers(student):
            return skeleton(student, lambda tensor: tensor.detach().cpu().clone()).eval()


def classifier_step(
    module: L.LightningModule, net: nn.Module, task_loss: Callable[[Tensor, Tensor], Tensor], batch: Any, split: str
) -> Tensor:
    """The loss of one batch of (inputs, labels); logs it, and outside of training the accuracy too."""
    inputs, labels = batch
    logits = net(inputs)
    loss = task_loss(logits, labels)
    module.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
    if split != "train":
        correct = multiclass_accuracy(logits, labels, logits.shape[-1], average="micro")
        module.log(f"{split}/acc", correct, batch_size=len(labels), sync_dist=True, prog_bar=True)
    return loss
