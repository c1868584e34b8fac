"""The loggers of a job, and what W&B is told of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from lightning_compress.app.account import offline_mode
from lightning_compress.callbacks.logs import final_figures

__all__ = ["finish_loggers", "job_loggers", "log_artifact", "log_metrics", "method_name", "wandb_logger"]

_LONGEST_TAG = 64  # W&B refuses longer ones, and names of more than 128
_LONGEST_NAME = 128


@contextmanager
def job_loggers(config: DictConfig) -> Iterator[list[Logger]]:
    """The loggers of one job; whatever becomes of it, their runs end with the block.

    A run of W&B begins with the block, so that a job shows there which fails before anything is trained, and holds the
    whole configuration.

    Args:
        config: what `conf/train.yaml` composes to; `config.logger` has loggers by name, or none.

    Raises:
        MisconfigurationException: W&B cannot begin a run.
    """
    loggers: list[Logger] = []
    status = "failed"
    try:
        loggers += [instantiate(node, _convert_="all") for node in (config.logger or {}).values() if node]
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                _begin(logger, config)
        yield loggers
        status = "success"
    finally:
        finish_loggers(loggers, status)


def finish_loggers(loggers: Iterable[Logger], status: str = "success") -> None:
    """End the runs of loggers that keep one open for the life of the process.

    Args:
        loggers: of a job.
        status: `success`; with anything else W&B shows the run as failed.
    """
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and logger.version is not None:  # else its run has not begun
            logger.experiment.finish(exit_code=0 if status == "success" else 1)


def wandb_logger(
    save_dir: str | os.PathLike[str],
    project: str,
    *,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] | None = None,
    offline: bool | None = None,
    **settings: Any,
) -> WandbLogger:
    """A W&B logger that works without an account.

    In a job of Hydra's what is not given is known: runs of a sweep have its name for their group.

    Args:
        save_dir: where W&B writes.
        project: its project.
        name: the run's name.
        group: what runs are put together under; by default the sweep's name, and none of a job alone.
        job_type: what kind of a run it is; by default the method, or the recipe, where that is more than one method.
        tags: by default arch, method and data.
        offline: whether to write files only. By default online where W&B finds an API key (in the environment or
            from `wandb login`) and offline where it does not; `WANDB_MODE` outweighs this.
        settings: further arguments of `wandb.init`: `entity`, for example.

    Returns:
        The logger. End its run with `finish_loggers`, or the next one in this process is merged into it.
    """
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        choices, method = _choices(), method_name(_choices())
        if group is None and hydra.mode is RunMode.MULTIRUN:
            group = hydra.callbacks["sweep"].name
        job_type = job_type or method
        if tags is None:
            tags = [tag[:_LONGEST_TAG] for tag in (choices.get("arch"), method, choices.get("data")) if tag]
    return WandbLogger(
        save_dir=os.fspath(save_dir),
        project=project,
        name=name[:_LONGEST_NAME] if name else None,
        group=group,
        job_type=job_type,
        tags=tags,
        # Told so by its own argument, WandbLogger puts it into the environment, for all jobs that follow.
        mode="offline" if offline_mode(offline) else None,
        **settings,
    )


def method_name(choices: Mapping[str, Any]) -> str:
    """What was done to the network, by the names that `conf/` has for it.

    Args:
        choices: configuration group -> option.

    Example:
        >>> method_name({"recipe": "single", "method": "low_rank"})
        'low_rank'
        >>> method_name({"recipe": "deep_compression", "method": "channel_pruning"})
        'deep_compression'
    """
    recipe = choices.get("recipe") or "single"
    return str(choices.get("method") or "none") if recipe == "single" else str(recipe)


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Log the metrics of both networks.

    Args:
        loggers: of the job.
        metrics: `dense` or `final` -> name -> value.
    """
    figures = {f"{side}/{name}": value for side, values in metrics.items() for name, value in values.items()}
    for logger in loggers:
        logger.log_metrics(figures)


def log_artifact(loggers: Iterable[Logger], files: Sequence[Path], results: Mapping[str, Any]) -> None:
    """Keep a job's network in W&B, as `{arch}-{method}` under the alias `compressed`.

    Args:
        loggers: of the job; those that are not W&B's are left out.
        files: what belongs to it.
        results: its `metrics` and the `figures` of its report, which become the artifact's metadata.
    """
    boards = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not boards:
        return
    import wandb

    choices = _choices()
    name = re.sub(r"[^\w.-]", "-", f"{choices.get('arch') or 'network'}-{method_name(choices)}", flags=re.ASCII)
    figures = {f"{side}/{key}": value for side, own in results["metrics"].items() for key, value in own.items()}
    for board in boards:
        metadata = figures | final_figures(results["figures"])
        artifact = wandb.Artifact(name[:_LONGEST_NAME], type="model", metadata=metadata)
        for file in files:
            artifact.add_file(str(file))
        board.experiment.log_artifact(artifact, aliases=["compressed"])


def _begin(logger: WandbLogger, config: DictConfig) -> None:
    import wandb

    try:
        run = logger.experiment
    except wandb.Error as error:
        raise MisconfigurationException(
            f"W&B cannot begin a run: {error}; logger.wandb.offline=true needs neither key nor server"
        ) from error
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    # group and job_type again: who reads an offline run's files, or filters a report, has them only here
    told = {"group": run.group or None, "job_type": run.job_type or None, "choices": _choices()}
    logger.log_hyperparams({**values, **told})


def _choices() -> dict[str, Any]:
    """Which option was chosen of each group of `conf/`; nothing outside of a job of Hydra's."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {str(group): option for group, option in choices.items() if not str(group).startswith("hydra/")}
