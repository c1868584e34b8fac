"""The metrics of a network other than the one in training, on the validation data, without disturbing the training."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_compress.edits import named_tensors
from lightning_compress.quiet import without_observers

__all__ = ["evaluate", "from_rank_zero"]


def evaluate(
    trainer: L.Trainer, module: L.LightningModule, path: str, network: nn.Module, *, batches: int | None = None
) -> dict[str, float]:
    """What `module` logs in validation if its network at `path` were `network`.

    A second, quiet Trainer validates a copy of the module: the same data, device and precision; no logger, callback or
    progress bar. The module, its data and torch's random state are left as they were. Where several processes train,
    each evaluates its share and the mean over them is returned, as `self.log(..., sync_dist=True)` does; all must call.

    Args:
        trainer: the Trainer that fits the module.
        module: the LightningModule.
        path: dotted name of the network in it; empty if it is the module itself.
        network: what to put in its place, with the same tensor names; it is moved to the device and back.
        batches: how many batches at most; by default as many as the Trainer uses.

    Returns:
        Metric name -> value.

    Raises:
        MisconfigurationException: there is no validation loop, or the module cannot be copied.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation:
        raise MisconfigurationException(
            "a metric needs validation: define `validation_step`, give validation data and leave `limit_val_batches` "
            "above 0, or name no metric"
        )
    device = trainer.strategy.root_device
    limit = trainer.limit_val_batches if batches is None else batches
    with isolate_rng(), _quiet(), torch.compiler.set_stance("force_eager"):
        if loop._combined_loader is None:  # as the fit loop does before the first validation
            stage = trainer.state.stage
            trainer.validating = True
            loop.setup_data()
            trainer.state.stage = stage
        duplicate = _transplanted(module, path, network)
        inner = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.index is None else [device.index],
            precision=trainer.precision,
            limit_val_batches=limit,
            inference_mode=loop.inference_mode,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = _SameData(trainer)
        with data.lent_to(inner):
            inner.validate(duplicate, datamodule=data, verbose=False)
        duplicate.trainer = None
    values = {name: value.to(device) for name, value in inner.callback_metrics.items()}
    return {name: float(trainer.strategy.reduce(value, reduce_op="mean")) for name, value in sorted(values.items())}


def from_rank_zero(trainer: L.Trainer, network: nn.Module) -> None:
    """Give `network` the values that it has in the first process: running statistics differ between processes."""
    if trainer.world_size > 1:
        network.load_state_dict(trainer.strategy.broadcast(network.state_dict()))


class _SameData(L.LightningDataModule):
    """The data of a running fit for a second Trainer: its loaders, and the transfer hooks of the user's data module."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self._source = trainer.datamodule  # type: ignore[attr-defined]
        self._loaders = trainer.val_dataloaders
        if self._source is not None:
            # Lightning asks whether these are overridden by comparing their code with its own, so that a method that
            # the user's data module inherits counts as not overridden here either.
            for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
                setattr(self, hook, getattr(self._source, hook))

    def val_dataloader(self) -> Any:
        return self._loaders

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("_source")
        if source is None:
            raise AttributeError(name)
        return getattr(source, name)

    @contextlib.contextmanager
    def lent_to(self, trainer: L.Trainer) -> Iterator[None]:
        """Let the user's data module see `trainer`: its transfer hooks may ask whether it is training."""
        if self._source is None:
            yield
            return
        own = self._source.trainer
        self._source.trainer = trainer
        try:
            yield
        finally:
            self._source.trainer = own


def _transplanted(module: L.LightningModule, path: str, network: nn.Module) -> L.LightningModule:
    """A copy of `module` with `network` in it, which shares nothing with a running fit."""
    old = module.get_submodule(path)
    new = dict(named_tensors(network))
    memo: dict[int, Any] = {id(tensor): new[name] for name, tensor in named_tensors(old) if name in new}
    if old is not module:
        memo[id(old)] = network
    if module._trainer is not None:
        memo[id(module._trainer)] = None
    try:
        with without_observers(module):
            duplicate = network if old is module else copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, pickle.PicklingError) as error:
        raise MisconfigurationException(
            f"a metric is taken on a copy of {type(module).__name__}, and it cannot be copied: {error}; keep what "
            "cannot be copied (open files, tensors of a graph) out of its attributes, or name no metric"
        ) from error
    assert isinstance(duplicate, L.LightningModule)
    for name in [name for name in duplicate.__dict__ if callable(getattr(type(duplicate), name, None))]:
        # Callbacks wrap methods (`training_step`) on the instance; such a wrapper holds the original, not the copy.
        del duplicate.__dict__[name]
    duplicate._metric_attributes = None  # Lightning remembers metrics by id
    return duplicate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No messages of a second Trainer about devices and loaders: the first has said it all."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
