"""The dense network that jobs start from: trained once for all jobs that agree on what determines it."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_compress import __version__
from lightning_compress.app.build import make_method, make_net, make_task, make_trainer, newest_checkpoint
from lightning_compress.app.jobs import alone, config_digest
from lightning_compress.files import open_atomic

__all__ = ["dense_task", "load_weights"]

log = logging.getLogger(__name__)


def dense_task(
    config: DictConfig, data: L.LightningDataModule, teacher: nn.Module | None = None, named: str = "dense.ckpt"
) -> L.LightningModule:
    """The task with the weights of the dense network: from `dense.ckpt`, from the cache, or trained now.

    The cache knows a network by what it is trained with: `arch`, `data`, `seed`, `task` and `trainer` with what `dense`
    changes in them, and this package's version. PyTorch's version does not count: it would train everything again
    for differences below those between seeds. Jobs side by side wait for the one that trains.

    Args:
        config: a job's configuration.
        data: what to train on.
        teacher: learn from it by `config.method`; `config.teacher` and the method then count for the cache too.
        named: what `config.dense.ckpt` is called by the user.

    Returns:
        The task as it is to be fine-tuned.

    Raises:
        FileNotFoundError: `dense.ckpt` names no file.
        ValueError: the weights in it are of another network.
    """
    task = make_task(config, make_net(config))
    if config.dense.ckpt is not None:
        load_weights(task, Path(config.dense.ckpt), named)
        return task
    config = _as_trained(config)
    path = _cached(config, taught=teacher is not None)
    with alone(path.with_suffix(".lock"), f"training the dense network {path}"):
        if path.is_file():
            log.info("dense network: %s", path)
        else:
            _train(config, data, path, [] if teacher is None else [make_method(config.method, teacher)])
    load_weights(task, path)
    return task


def load_weights(task: L.LightningModule, path: Path, named: str = "dense.ckpt") -> None:
    """Load a checkpoint into a task: a Lightning one, or the state dict of the task or of one of its submodules.

    Args:
        task: the module to load into.
        path: a file that `torch.load(weights_only=True)` reads.
        named: the setting that named it, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its tensors are not those of the task, nor of one of its submodules.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{named}: there is no file {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:  # whatever damage leads to
        raise ValueError(f"{named}: {path} holds something else than tensors, or is damaged: {error}") from error
    state: Mapping[str, Tensor] = loaded.get("state_dict", loaded)
    shapes = _shapes(state)
    for module in (task, *task.children()):
        if _shapes(module.state_dict()) == shapes:
            module.load_state_dict(state)
            return
    expected = _shapes(task.state_dict())
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    differing = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    raise ValueError(
        f"{named}: {path} is of another network: {len(missing)} tensors are missing {missing[:3]}, {len(unknown)} "
        f"unknown {unknown[:3]}, {len(differing)} of another shape {differing[:3]}; is `arch` what it was made with?"
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _as_trained(config: DictConfig) -> DictConfig:
    """The configuration with the task and the epochs of the dense network's own training."""
    task = OmegaConf.to_container(config.dense.task, resolve=True)
    changed = OmegaConf.merge(config, {"task": task, "trainer": {"max_epochs": config.dense.max_epochs}})
    return cast(DictConfig, changed)


def _cached(config: DictConfig, taught: bool) -> Path:
    learning = ["teacher", "method"] if taught else []
    digest = config_digest(config, ["arch", "data", "task", "trainer", "seed", *learning])
    kind = str(config.arch.get("name", config.arch.get("_target_", "network"))).rpartition(".")[2]
    return Path(config.cache_dir) / f"{kind}-{digest}-{__version__}.ckpt"


def _train(config: DictConfig, data: L.LightningDataModule, path: Path, callbacks: list[L.Callback]) -> None:
    L.seed_everything(config.seed, workers=True, verbose=False)
    task = make_task(config, make_net(config))
    partial = path.with_suffix(".partial")
    last = partial / "last.ckpt"
    log.info("training the dense network for %d epochs: %s", config.trainer.max_epochs, path)
    trainer = make_trainer(config, callbacks=[*callbacks, newest_checkpoint(partial)], logger=False)
    trainer.fit(task, data, ckpt_path=last if last.is_file() else None)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with open_atomic(path) as file:
            torch.save({"state_dict": task.state_dict(), "metrics": metrics, "torch": str(torch.__version__)}, file)
        shutil.rmtree(partial)
    trainer.strategy.barrier()
