"""Teachers of a job: trained once and cached, as dense networks are, and themselves taught if they have a teacher."""

from __future__ import annotations

from typing import cast

import lightning as L
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_compress.app.dense import dense_task

__all__ = ["TRAINED", "trained_teacher"]

TRAINED = "trained"


def trained_teacher(config: DictConfig, data: L.LightningDataModule) -> nn.Module:
    """The network of `teacher.net`, with weights from `teacher.ckpt`, from the cache, or trained now.

    A teacher that has a teacher of its own (`+arch@teacher.teacher.net=resnet56`) learns from it by the job's method: a
    chain of assistants, or of born-again generations. Each link starts from another seed.

    Args:
        config: a job's configuration.
        data: what to train on.

    Raises:
        FileNotFoundError, ValueError: see `dense_task`.
    """
    node = config.teacher
    if node.net is None:
        raise ValueError("the method needs a teacher: say which with arch@teacher.net=NAME")
    above = node.get("teacher")
    own = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(config, resolve=False)))
    OmegaConf.update(own, "arch", OmegaConf.to_container(node.net, resolve=True), merge=False)
    OmegaConf.update(own, "dense.ckpt", node.get("ckpt"), merge=False)
    OmegaConf.update(own, "dense.max_epochs", config.epochs.dense, merge=False)
    OmegaConf.update(own, "seed", config.seed + 1)
    OmegaConf.update(own, "teacher", above or {"net": None, "ckpt": None}, merge=False)
    teacher = trained_teacher(own, data) if above else None
    task = dense_task(own, data, teacher, "teacher.ckpt")
    return cast(nn.Module, task.net)
