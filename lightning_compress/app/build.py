"""Making the parts of a job from its configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch import nn

__all__ = ["make_data", "make_method", "make_net", "make_task", "make_trainer", "newest_checkpoint"]


def make_data(config: DictConfig) -> L.LightningDataModule:
    """The data of `config.data`."""
    data: L.LightningDataModule = instantiate(config.data, _convert_="all")
    return data


def make_net(config: DictConfig) -> nn.Module:
    """The network of `config.arch`, untrained."""
    net: nn.Module = instantiate(config.arch, _convert_="all")
    return net


def make_task(config: DictConfig, net: nn.Module) -> L.LightningModule:
    """The LightningModule of `config.task` around a network."""
    task: L.LightningModule = instantiate(config.task, net=net, _convert_="all")
    return task


def make_method(node: DictConfig, teacher: nn.Module | None = None) -> L.Callback:
    """The callback of a method, with a teacher in place of the one that was to be trained."""
    given = {} if teacher is None else {"teacher": teacher}
    callback: L.Callback = instantiate(node, _convert_="all", **given)
    return callback


def make_trainer(config: DictConfig, **changes: Any) -> L.Trainer:
    """The Trainer of `config.trainer`, with arguments that outweigh it."""
    greeting = logging.getLogger("lightning.pytorch")
    level = greeting.level
    greeting.setLevel(logging.WARNING)  # a job makes several Trainers, and each names the hardware it sees
    try:
        trainer: L.Trainer = instantiate(config.trainer, _convert_="all", **changes)
    finally:
        greeting.setLevel(level)
    return trainer


def newest_checkpoint(folder: Path) -> ModelCheckpoint:
    """A callback that keeps the newest state in `folder`/last.ckpt, whatever its score: what a resume starts from."""
    return ModelCheckpoint(
        dirpath=folder, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
