"""What lives around a network in a Lightning run and has to follow when its shapes change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.checkpoints import replay_checkpoint
from lightning_compress.edits import Change, Edit, Replacement, apply_edits
from lightning_compress.optimizers import follow_edits

__all__ = ["check_surroundings", "follow", "forget_best", "replay_on_load", "stop_replaying"]


def check_surroundings(trainer: pl.Trainer) -> None:
    """Refuse, by name, what cannot follow a change of shape.

    Raises:
        MisconfigurationException: a strategy that shards parameters, or Lightning's `StochasticWeightAveraging`.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"compression during training does not work with {type(trainer.strategy).__name__}: it shards "
            "the parameters before they could be edited. Use DDP or a single device, or compress first and train what "
            "comes out."
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in _callbacks(trainer)):
        raise MisconfigurationException(
            "StochasticWeightAveraging keeps averages of the dense shapes; use WeightAveraging or EMAWeightAveraging, "
            "which follow the edits"
        )


def replay_on_load(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """From now on, loading a checkpoint into the module replays the checkpoint's edits before its weights are loaded.

    The callbacks' own `on_load_checkpoint` comes after the weights, too late; so the module's hook is wrapped, on the
    instance. Wrapping twice changes nothing.
    """
    hook = pl_module.on_load_checkpoint
    if hasattr(hook, "_wrapped_before"):
        return

    @wraps(hook)
    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        for module in (pl_module, *_averages(pl_module.trainer)):
            replay_checkpoint(module, checkpoint)
        hook(checkpoint)

    before = pl_module.__dict__.get("on_load_checkpoint")
    on_load_checkpoint._wrapped_before = before  # type: ignore[attr-defined]
    pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]


def stop_replaying(pl_module: pl.LightningModule) -> None:
    """Undo `replay_on_load`: a module with a closure on it could not be pickled."""
    hook = pl_module.__dict__.get("on_load_checkpoint")
    if hook is not None and hasattr(hook, "_wrapped_before"):
        del pl_module.__dict__["on_load_checkpoint"]
        if hook._wrapped_before is not None:
            pl_module.__dict__["on_load_checkpoint"] = hook._wrapped_before


def follow(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    path: str,
    edits: Sequence[Edit],
    changes: Sequence[Change | Replacement],
) -> None:
    """After an edit: bring the optimizers along, start averages anew from the edited network, wrap DDP again."""
    for optimizer in trainer.optimizers:
        follow_edits(optimizer, changes)
    for callback in _callbacks(trainer):
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model
            apply_edits(average.module.get_submodule(path), edits)
            # An average of what the network was before says nothing about what it is now.
            average.module.load_state_dict(pl_module.state_dict())
            average.n_averaged.zero_()
    if isinstance(trainer.strategy, DDPStrategy):
        # DDP's buckets have the old shapes. Wrapping anew also sends rank 0's weights and buffers to all ranks.
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()


def forget_best(trainer: pl.Trainer) -> None:
    """After a change of shape the best score so far is another network's: start looking again. Files stay."""
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint):
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        elif isinstance(callback, EarlyStopping):
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.wait_count = 0


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _averages(trainer: pl.Trainer) -> list[pl.LightningModule]:
    found = [c._average_model for c in _callbacks(trainer) if isinstance(c, WeightAveraging)]
    return [average.module for average in found if average is not None]  # type: ignore[misc]
