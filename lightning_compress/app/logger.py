"""Loggers that need a decision before they can be made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

__all__ = ["finish_loggers", "wandb_logger"]


def wandb_logger(
    save_dir: str,
    project: str,
    name: str | None = None,
    group: str | None = None,
    offline: bool | None = None,
    **settings: Any,
) -> WandbLogger:
    """A W&B logger that works without an account.

    Args:
        save_dir: where W&B writes.
        project: its project.
        name: the run's name.
        group: what runs are put together under.
        offline: whether to write files only. By default online where W&B finds an API key (in the environment or
            from `wandb login`) and offline where it does not; `WANDB_MODE` outweighs this.
        settings: further arguments of `wandb.init`.

    Returns:
        The logger. End its run with `finish_loggers`, or the next one in this process is merged into it.
    """
    import wandb

    if offline is None:
        mode = os.environ.get("WANDB_MODE")
        offline = mode in ("offline", "dryrun") or (not mode and not wandb.login(prompt=False, verify=False))
    if offline:
        settings["mode"] = "offline"  # WandbLogger only sets WANDB_MODE, which W&B has read by now
    return WandbLogger(save_dir=save_dir, project=project, name=name, group=group, offline=offline, **settings)


def finish_loggers(loggers: Iterable[Logger]) -> None:
    """End the runs of loggers that keep one open for the life of the process."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
