"""Deep mutual learning: students that teach each other, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_compress.distill.losses import KD
from lightning_compress.distill.module import MakeOptimizer
from lightning_compress.distill.terms import Loss, Term, as_terms
from lightning_compress.edits import skeleton

__all__ = ["MutualModule"]


class MutualModule(L.LightningModule):
    """Several classifiers on the same batches, each learning from the labels and from all others.

    Zhang, Xiang, Hospedales and Lu 2018, arXiv 1706.00384; all students take their step at once, each taught by the
    others' outputs from before it. Logs `train/loss`, and `val/acc_<name>` and `test/acc_<name>` for each student.

    Args:
        students: from inputs to logits [N, classes]; by name, or in a list.
        losses: between outputs; by default KL divergence at temperature 1, as in the paper.
        task_loss: called as `task_loss(logits, labels)`; by default cross-entropy.
        optimizer: makes the optimizer from all students' parameters; by default AdamW at a rate of 1e-3.

    Raises:
        ValueError: fewer than two students, or a loss between layers inside them.

    Example:
        >>> nets = {name: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for name in ("a", "b")}
        >>> MutualModule(nets).export("a").training
        False
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module] | Sequence[nn.Module],
        losses: Loss | Term | Mapping[str, Loss | Term] | None = None,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        super().__init__()
        named = dict(students) if isinstance(students, Mapping) else {str(i): net for i, net in enumerate(students)}
        if len(named) < 2:
            raise ValueError(f"mutual learning needs at least two students, got {len(named)}")
        self.terms = as_terms({"kd": KD(temperature=1.0)} if losses is None else losses)
        for name, term in self.terms.items():
            if term.pairs != (("", ""),):
                raise ValueError(
                    f"losses.{name}: students learn from each other's outputs, not from layers inside them"
                )
        self.students = nn.ModuleDict(named)
        self.task_loss = F.cross_entropy if task_loss is None else task_loss
        self.optimizer = partial(optim.AdamW, lr=1e-3) if optimizer is None else optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The sum of all students' losses; none reaches another's weights."""
        inputs, labels = batch
        outputs = [student(inputs) for student in self.students.values()]
        losses: list[Tensor] = []
        for index, logits in enumerate(outputs):
            others = [other.detach() for i, other in enumerate(outputs) if i != index]
            taught = [
                term.weight * term.loss(logits, other, labels) / len(others)
                for term in self.terms.values()
                for other in others
            ]
            losses += [self.task_loss(logits, labels), *taught]
        total: Tensor = sum(losses[1:], losses[0])
        self.log("train/loss", total, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return total

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log each student's accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log each student's accuracy."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Sequence[Tensor], split: str) -> None:
        inputs, labels = batch
        for name, student in self.students.items():
            logits = student(inputs)
            correct = multiclass_accuracy(logits, labels, logits.shape[-1], average="micro")
            self.log(f"{split}/acc_{name}", correct, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """One optimizer for all: their losses do not meet."""
        return self.optimizer(self.parameters())

    def export(self, name: str) -> nn.Module:
        """A copy of one student, on the CPU, in evaluation mode.

        Raises:
            ValueError: there is no student of that name.
        """
        if name not in self.students:
            raise ValueError(f"there is no student {name!r}; there are {', '.join(self.students)}")
        return skeleton(self.students[name], lambda tensor: tensor.detach().cpu().clone()).eval()
