"""The life of a compression callback inside a Lightning run.

`CompressionCallback` owns everything that is the same for every method: when edits happen, how checkpoints carry them,
what has to follow a change of shape (optimizers, DDP, averaged weights, the memory of "best"). A method answers three
questions: `check` (can the budget be met?), `edit` (what to do at this amount) and, each step, `constrain`; and it may
`prepare` for an edit and have a last word when it was `edited`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_compress.callbacks.capture import Captured, find_network
from lightning_compress.callbacks.surroundings import (
    check_surroundings,
    follow,
    forget_best,
    replay_on_load,
    stop_replaying,
)
from lightning_compress.callbacks.timing import Milestone, milestones
from lightning_compress.checkpoints import record_edits
from lightning_compress.edits import Edit, Quantize, apply_edits, edits_from_json, edits_to_json, history
from lightning_compress.schedule import SCHEDULES
from lightning_compress.waiting import show_waiting
from lightning_compress.wording import require_choice

__all__ = ["CompressionCallback"]


class CompressionCallback(pl.Callback):
    """Base of the callbacks that edit a network while it trains.

    Edits are made before the first batch of an epoch (or, in runs measured in steps, between two steps), never at an
    epoch's end: a checkpoint saved there would hold the edited weights under the score from before.

    Other callbacks that define `before_edits(trainer, pl_module, network_path)` or
    `after_edits(trainer, pl_module, network_path, edits, frozen)` are called around every edit.

    Args:
        start: when the first edit is made: a float is a fraction of training, an integer an epoch.
        end: when the last edit is made, likewise. Training goes on after it, to recover.
        steps: number of edits.
        schedule: how the amount grows over them: `one_shot`, `linear` or `cubic`.
        network: dotted name of the network inside the LightningModule; by default its only child with parameters, or
            the LightningModule itself.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from lightning_compress.callbacks.capture import capture
        >>> class KeepAll(CompressionCallback):
        ...     def check(self, trainer, pl_module):
        ...         return {}
        ...     def edit(self, trainer, pl_module, amount):
        ...         return capture(trainer, pl_module, self.network), [], {}
        >>> KeepAll(start=0.1, end=0.6, steps=2).schedule
        'cubic'
    """

    settles_values: ClassVar[bool] = False
    """Whether a step of the way may change values only, so that there is no edit to carry out."""

    def __init__(
        self,
        *,
        start: float | int = 0.0,
        end: float | int = 0.5,
        steps: int = 5,
        schedule: str = "cubic",
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        for name, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"`{name}` must be a fraction of training in [0, 1] or an epoch, got {value!r}")
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"`{name}` as a float is a fraction of training in [0, 1]; for epoch {value:g} write an integer"
                )
        if type(start) is type(end) and start > end:
            raise ValueError(f"`start` must not be after `end`, got start={start}, end={end}")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer of at least 1, got {steps!r}")
        require_choice("schedule", schedule, SCHEDULES)
        self.start, self.end, self.steps, self.schedule, self.network = start, end, steps, schedule, network
        self.done = 0.0
        self.dense: dict[str, float] = {}
        self._milestones: list[Milestone] = []
        self._network: nn.Module | None = None

    # What a method answers.

    @abstractmethod
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Before training: raise if the budget cannot be met; return what the dense network costs."""

    @abstractmethod
    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """Plan the edits that bring the network `amount` of the way to the budget, without applying them.

        Returns:
            The captured network, the edits, and what was frozen and why.
        """

    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each step, before the optimizer's: regularisers, gathered gradients."""

    def prepare(self, captured: Captured, edits: Sequence[Edit]) -> None:
        """Before the edits are applied, those of rank 0: find the weights that will be set after."""

    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the edits were applied: new weights, re-estimated statistics."""

    def target(self, pl_module: pl.LightningModule) -> nn.Module:
        """The network; looked for once in a run, for each step may ask."""
        if self._network is None:
            self._network = pl_module.get_submodule(find_network(pl_module, self.network))
        return self._network

    def refuse_finished(self, network: nn.Module) -> None:
        """Raise if an earlier run has left the network in a state that the method cannot go on from.

        Raises:
            MisconfigurationException: it is quantized.
        """
        if any(isinstance(edit, Quantize) for edit in history(network)):
            raise MisconfigurationException(
                f"the network is quantized already, and quantization comes last: {type(self).__name__} goes before it, "
                "on the network as it was then"
            )

    # The life.

    @property
    def state_key(self) -> str:
        """Two callbacks of one class in one run keep their states apart by what they were asked for."""
        return self._generate_state_key(start=self.start, end=self.end, network=self.network)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let checkpoints bring their edits."""
        find_network(pl_module, self.network)  # kept later only: `configure_model` comes after this
        self._network = None  # of a run that ended in an error
        if stage == "fit":
            check_surroundings(trainer)
        show_waiting(trainer.progress_bar_callback is not None)
        replay_on_load(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it came."""
        stop_replaying(pl_module)
        show_waiting(True)
        self._network = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Work out when edits are due; refuse a budget that cannot be met."""
        self._milestones = milestones(trainer, self.start, self.end, self.steps, SCHEDULES[self.schedule])
        if not self.dense:
            self.refuse_finished(self.target(pl_module))
            self.dense = self.check(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit, if an edit is due at this epoch."""
        self._edit_if_due(trainer, pl_module, "epoch", trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Edit, if an edit is due at this step; never inside an accumulation."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._edit_if_due(trainer, pl_module, "step", trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Hand the gradients to the method."""
        self.constrain(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if training ended before the budget was reached."""
        if self._milestones and self.done < self._milestones[-1].amount:
            rank_zero_warn(
                f"training ended before {type(self).__name__}'s last edit: the network went {self.done:.0%} of the way "
                "to its budget. Train longer, or let `end` be earlier."
            )

    def _edit_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, unit: str, now: int) -> None:
        due = [m.amount for m in self._milestones if m.unit == unit and m.at <= now]
        if not due or due[-1] <= self.done:
            return
        if self.apply_edits(trainer, pl_module, due[-1]):
            rank_zero_info(f"{type(self).__name__}: {due[-1]:.0%} of the way to its budget at {unit} {now}")

    def apply_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float) -> bool:
        """Bring the network `amount` of the way to the budget; whether anything was done."""
        captured, edits, frozen = self.edit(trainer, pl_module, amount)
        path = captured.path
        # Every rank has planned; rank 0's plan is the one that counts.
        edits = edits_from_json(trainer.strategy.broadcast(edits_to_json(edits)))
        self.done = amount
        if not edits and not self.settles_values:
            return False
        _tell(trainer, "before_edits", pl_module, path)
        self.prepare(captured, edits)
        changes = apply_edits(captured.network, edits)
        self.edited(trainer, pl_module)
        follow(trainer, pl_module, path, edits, changes)
        forget_best(trainer)
        _tell(trainer, "after_edits", pl_module, path, list(edits), dict(frozen))
        return True

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """How far the method has come; the edits themselves are stored once for all callbacks."""
        return {"done": self.done, "dense": dict(self.dense)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.done, self.dense = state_dict["done"], dict(state_dict["dense"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the network's history into the checkpoint."""
        record_edits(pl_module, find_network(pl_module, self.network), checkpoint)


def _tell(trainer: pl.Trainer, hook: str, pl_module: pl.LightningModule, *args: Any) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        listener = getattr(callback, hook, None)
        if listener is not None:
            listener(trainer, pl_module, *args)
