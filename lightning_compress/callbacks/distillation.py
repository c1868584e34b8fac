"""Distillation in a Lightning run, without touching the user's step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.agreement import Agreement
from lightning_compress.callbacks.answers import CachedAnswers
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import capture, find_network
from lightning_compress.callbacks.projecting import Projected
from lightning_compress.callbacks.snapshot import Snapshot
from lightning_compress.callbacks.targets import find_target
from lightning_compress.callbacks.wrapping import Wrapping
from lightning_compress.distill.engine import DistillationError, Engine, TeacherCall
from lightning_compress.distill.losses import KD
from lightning_compress.distill.teachers import EXITS, SELF, FrozenTeacher, Teacher, as_teachers, load_teacher
from lightning_compress.distill.terms import Loss, Term, as_terms
from lightning_compress.edits import Edit

__all__ = ["Distillation"]


class Distillation(pl.Callback):
    """Train a network on a teacher's outputs beside its own loss (Hinton et al. 2015, arXiv 1503.02531).

    The LightningModule's `training_step` is wrapped on the instance: whatever the step calls the student with, mixup
    and augmentation included, goes to the teacher too, and `sum(weight * loss(student, teacher))` is added to the loss
    that the step returns, or passes to `manual_backward`. The teacher is in no checkpoint, optimizer or DDP bucket.

    Args:
        teacher: a network; the path of a checkpoint or of a compressed artifact; `"timm/NAME"` or `"torchvision/NAME"`;
            a `Teacher` to say more; several of them; or `"self"`: the student as it is before the first edit that a
            method of this run makes (until then nothing is added, and the loss is the step's own); or `"exits"`: the
            student's own deeper layers and output, in the same step (see `EarlyExit`).
        losses: a loss or `Term`, or several by name. A loss is called as `loss(student, teacher, target)`.
        task_weight: factor on the step's own loss.
        student: dotted name of the student in the LightningModule; by default its only child with parameters.
        target: key or index of the labels in the batch, for losses that need them; found in the usual places.
        cache: folder for the outputs of the teachers, keyed by sample: each sample is taught once. Refused where inputs
            are augmented randomly.
        metrics: in validation, log agreement with the teacher and, with labels, the calibration of both.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from lightning_compress.distill import Term
        >>> from lightning_compress.distill.losses import KD, FitNet
        >>> losses = {"kd": Term(KD(temperature=4.0), weight=0.9), "fitnet": Term(FitNet(), student="layer2")}
        >>> sorted(Distillation("teacher.ckpt", losses, task_weight=0.1).terms)
        ['fitnet', 'kd']
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher | str | Path | Sequence[nn.Module | Teacher | str | Path],
        losses: Loss | Term | Mapping[str, Loss | Term] | None = None,
        task_weight: float = 1.0,
        student: str | None = None,
        target: str | int | None = None,
        cache: str | Path | None = None,
        metrics: bool = True,
    ) -> None:
        """Check the arguments."""
        self.teachers = as_teachers(teacher)
        self.terms = as_terms({"kd": KD()} if losses is None else losses)
        if not isinstance(task_weight, int | float) or not task_weight >= 0:
            raise ValueError(f"`task_weight` must be a number of at least 0, got {task_weight!r}")
        fixed = self.teachers[0].source not in (SELF, EXITS)
        if cache is not None and (not fixed or any(pair != ("", "") for t in self.terms.values() for pair in t.pairs)):
            raise ValueError(
                "`cache` keeps the outputs of a fixed teacher: not of 'self' or 'exits', and not of layers inside it"
            )
        self.task_weight, self.student, self.target = task_weight, student, target
        self.cache, self.metrics = cache, metrics
        self._loaded: dict[str, Any] = {}
        self._batch: Any = None
        self._reset()

    def _reset(self) -> None:
        self._engine: Engine | None = None
        self._frozen: list[FrozenTeacher] = []
        self._agreement: Agreement | None = None
        self._wrapping: Wrapping | None = None
        self._answers: CachedAnswers | None = None
        self._snapshot: Snapshot | None = None
        self._projected = Projected()

    @property
    def _by_itself(self) -> bool:
        return self.teachers[0].source == SELF

    @property
    def _names(self) -> set[str]:
        return {"", *(name for term in self.terms.values() for _, name in term.pairs)}

    # The life.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the teachers, refuse what cannot work, wrap the step."""
        if stage != "fit":
            return
        self._release()
        path = find_network(pl_module, self.student)
        if self._by_itself and not any(isinstance(c, CompressionCallback) for c in _callbacks(trainer)):
            raise MisconfigurationException(
                "teacher='self' is the network before a method's first edit, and no callback of this run makes edits: "
                "add one, or give another teacher"
            )
        parts = {id(module) for module in pl_module.modules()}
        if self.teachers[0].source not in (SELF, EXITS):
            student = pl_module.get_submodule(path)
            for teacher in self.teachers:
                network = load_teacher(teacher, student)
                if id(network) in parts:
                    raise MisconfigurationException(
                        f"the teacher {teacher.name} is a submodule of {type(pl_module).__name__}: it would be in "
                        "every checkpoint and in the optimizer. Keep it outside of the module, and give it to "
                        "Distillation only"
                    )
                if teacher.precision is None and isinstance(trainer.precision_plugin, HalfPrecision | DoublePrecision):
                    network = trainer.precision_plugin.convert_module(copy.deepcopy(network))
                self._frozen.append(FrozenTeacher(network, teacher, self._names))
        if self.cache is not None:
            self._answers = CachedAnswers(self.cache, trainer)
        self._wrapping = Wrapping(pl_module)
        self._wrapping.wrap("training_step", self._training_step)
        if not pl_module.automatic_optimization:
            self._wrapping.wrap("manual_backward", self._manual_backward)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the student; a resumed run gets its projectors back before its optimizer's state is loaded."""
        path = find_network(pl_module, self.student)
        student = pl_module.get_submodule(path.removesuffix("._orig_mod"))  # a compiled one is called by its wrapper
        name = f"student {path.removesuffix('._orig_mod') or type(pl_module).__name__!r}"
        self._engine = Engine(student, self.terms, [], name, own=self.teachers[0].source == EXITS)
        loaded, self._loaded = self._loaded, {}
        if loaded.get("snapshot"):
            self._snapshot = Snapshot.find(loaded["snapshot"], pl_module.get_submodule(path), trainer)
            self._load_self(self._snapshot)
        self._engine.restore(loaded.get("projectors", {}), trainer.strategy.root_device)
        self._projected.follow(trainer, student, self._engine.projectors)
        self._appoint(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run both sides on a first batch: sizes the projectors, and refuses shapes that do not go together."""
        waiting = not self._student_engine.teaching
        if waiting:  # for the first edit; the network teaches itself once, to size the projectors
            self._load_self(Snapshot.take(self._network(pl_module), trainer))
            self._appoint(trainer)
        self._prepare(trainer, pl_module)
        if waiting:
            self._dismiss()
        if self._answers is not None:
            self._answers.open(self._frozen, str(trainer.precision))
            self._appoint(trainer)
        if self.metrics:
            self._agreement = Agreement(self._student_engine.student, self._frozen, self.target)

    def before_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network_path: str) -> None:
        """Before the first edit: the network becomes its own teacher."""
        path = find_network(pl_module, self.student)
        if self._by_itself and not self._frozen and network_path == path:
            self._snapshot = Snapshot.take(pl_module.get_submodule(path), trainer)
            self._load_self(self._snapshot)
            self._appoint(trainer)

    def after_edits(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        network_path: str,
        edits: Sequence[Edit],
        frozen: Mapping[str, str],
    ) -> None:
        """Layers may have changed their widths: their projectors start anew."""
        inside = any(pair != ("", "") for term in self.terms.values() for pair in term.pairs)
        if self._student_engine.teaching and inside:
            self._prepare(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Which samples the batch holds, if the teacher's outputs are kept by sample."""
        if self._answers is not None:
            self._answers.next_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Projectors are not in DDP's care: their gradients are averaged here."""
        self._projected.average_gradients(trainer, optimizer)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to compare the two."""
        if self._agreement is not None and not trainer.sanity_checking:
            self._agreement.start()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Where the labels of the coming forward pass are."""
        if self._agreement is not None:
            self._agreement.batch = batch

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how far student and teacher agree."""
        if self._agreement is not None:
            for name, value in self._agreement.finish().items():
                pl_module.log(f"distill/val_{name}", value)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it came."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it came."""
        if stage == "fit":
            self._release()

    # The step.

    def _training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        engine, module = self._student_engine, self._wrapped
        if not engine.teaching:
            return step(*args, **kwargs)
        self._batch = args[0] if args else next(iter(kwargs.values()))
        manual = not module.automatic_optimization
        try:
            with engine.listening(several=manual):
                output = step(*args, **kwargs)
                if manual:
                    return output
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if not isinstance(loss, Tensor):  # a step that is skipped
                    engine.skip()
                    return output
                total = self._total(loss)
                return {**output, "loss": total} if isinstance(output, Mapping) else total
        finally:
            self._batch = None

    def _manual_backward(self, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self._total(loss) if self._student_engine.pending else loss, *args, **kwargs)

    def _total(self, loss: Tensor) -> Tensor:
        engine = self._student_engine
        needing = [name for name, term in self.terms.items() if term.needs_target]
        target = find_target(self._batch, self.target, needing)
        size = engine.samples
        terms = engine.losses(target)
        total = self.task_weight * loss
        for value in terms.values():
            total = total + value
        for name, value in {"task": loss, **terms}.items():
            log = self._wrapped.log
            log(f"distill/{name}", value.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return total

    # Checkpoints.

    @property
    def state_key(self) -> str:
        """Two callbacks of one run keep their states apart by who teaches whom."""
        source = self.teachers[0].source
        kind = source if source in (SELF, EXITS) else "given"
        return self._generate_state_key(teacher=kind, student=self.student, losses=sorted(self.terms))

    def state_dict(self) -> dict[str, Any]:
        """The projectors, and the name of the dense network's file; never the teacher."""
        engine, snapshot = self._engine, self._snapshot
        return {
            "projectors": {} if engine is None else engine.records(),
            "snapshot": None if snapshot is None else snapshot.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._loaded = dict(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint after the first edit needs the dense network's file beside it."""
        if self._snapshot is not None:
            self._snapshot.save(trainer)

    # The parts.

    @property
    def _student_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("Distillation works inside of trainer.fit only")
        return self._engine

    @property
    def _wrapped(self) -> pl.LightningModule:
        assert self._wrapping is not None
        module: pl.LightningModule = self._wrapping.owner
        return module

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        return pl_module.get_submodule(find_network(pl_module, self.student))

    def _load_self(self, snapshot: Snapshot) -> None:
        self._frozen.append(FrozenTeacher(snapshot.network, self.teachers[0], self._names))

    def _appoint(self, trainer: pl.Trainer) -> None:
        """Let the engine ask the teachers that there are."""
        whole = sum(frozen.spec.weight for frozen in self._frozen)
        calls: list[tuple[float, TeacherCall]] = []
        for index, frozen in enumerate(self._frozen):
            frozen.to(trainer.strategy.root_device)
            ask = frozen if self._answers is None else self._answers.of(index, frozen)
            calls.append((frozen.spec.weight / whole, ask))
        self._student_engine.teachers = calls

    def _dismiss(self) -> None:
        for frozen in self._frozen:
            frozen.release()
        self._frozen.clear()
        self._student_engine.teachers = []

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = self._student_engine
        call = capture(trainer, pl_module, self.student).calls[0]
        if call.path:
            raise DistillationError(
                f"the {engine.who} is not called as a whole in `training_step`, only its {call.path!r} is: name the "
                "part that is called with `student`"
            )
        with isolate_rng():
            torch.manual_seed(
                torch.initial_seed() % 2**32
            )  # a projector's weights follow the run's seed, and cost none
            engine.prepare(call.args, call.kwargs)
        if len(engine.projectors):
            engine.projectors.load_state_dict(trainer.strategy.broadcast(engine.projectors.state_dict()))
        self._projected.follow(trainer, self._network(pl_module), engine.projectors)

    def _release(self) -> None:
        if self._wrapping is not None:
            self._wrapping.undo()
        if self._agreement is not None:
            self._agreement.remove()
        if self._answers is not None:
            self._answers.close()
        if self._engine is not None:
            self._engine.remove()
        for frozen in self._frozen:
            frozen.release()
        self._reset()


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
