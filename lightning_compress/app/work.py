"""The work of one job, from the dense network to the tested artifact."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch import nn

from lightning_compress.app.build import make_data, make_method, make_net, make_task, make_trainer, newest_checkpoint
from lightning_compress.app.dense import dense_task
from lightning_compress.app.jobs import Job, alone, config_digest
from lightning_compress.app.logger import job_loggers, log_artifact, log_metrics
from lightning_compress.app.teachers import TRAINED, trained_teacher
from lightning_compress.artifact import load_compressed

__all__ = ["run"]

log = logging.getLogger(__name__)


def run(config: DictConfig, folder: Path, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run one job to its end, or as much of it as is left to do.

    Args:
        config: what `conf/train.yaml` composes to.
        folder: where everything of the job is written.
        about: what it is called and how it is run again; see `describe`.

    Returns:
        The results; among them `metrics`, of the dense network and of the final one, and `figures`, of the report.
    """
    # Lightning prints what it logs; Hydra's root logger does so too, with the time, and into the job's log file.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    job = Job(folder, config_digest(config))
    with alone(folder / ".lock", f"at work in {folder}"):
        results = job.finished()
        if results is None:
            with job_loggers(config) as loggers:
                results = _work(config, job, about, loggers)
        else:
            log.info("finished before, nothing to do: %s", job.folder)
    return results


def _work(config: DictConfig, job: Job, about: Mapping[str, Any] | None, loggers: Sequence[Logger]) -> dict[str, Any]:
    resume = job.begin(about)
    if resume is not None:
        log.info("going on from %s", resume)

    # What can be wrong is made first, so that it is heard of before anything is trained.
    nodes = [node for node in config.recipe.values() if node]
    taught = [node.get("teacher") == TRAINED for node in nodes]
    methods = [
        make_method(node, nn.Identity() if by_teacher else None) for node, by_teacher in zip(nodes, taught, strict=True)
    ]
    report = instantiate(config.report, path=str(job.artifact), _convert_="all")
    data = make_data(config)
    if any(taught):
        teacher = trained_teacher(config, data)
        methods = [make_method(n, teacher) if by else m for n, m, by in zip(nodes, methods, taught, strict=True)]
    task = dense_task(config, data)
    dense = copy.deepcopy(task)

    L.seed_everything(config.seed, workers=True, verbose=False)  # the same, whether the dense network was cached or not
    drawn = [] if config.pictures is None else [instantiate(config.pictures, folder=str(job.folder / "pictures"))]
    callbacks = [*methods, *drawn, report, newest_checkpoint(job.checkpoints)]
    trainer = make_trainer(config, callbacks=callbacks, logger=loggers or False)
    trainer.fit(task, data, ckpt_path=resume)
    trainer.strategy.barrier()

    final = task if not job.artifact.is_file() else make_task(config, load_compressed(job.artifact, make_net(config)))
    metrics = {"dense": _evaluate(config, dense, data), "final": _evaluate(config, final, data)}
    measured = trainer.strategy.broadcast(report.results.figures() if report.results else {})
    results = {"metrics": metrics, "figures": measured}
    log_metrics(loggers, metrics)
    if trainer.is_global_zero:
        job.finish(config, metrics, measured, about)
        log_artifact(loggers, [job.artifact, report.results_path], results)
        for name in metrics["final"]:
            log.info("%s: dense %.4f, now %.4f", name, metrics["dense"][name], metrics["final"][name])
        log.info("results: %s", job.folder)
    return results


def _evaluate(config: DictConfig, task: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    """Validation and test metrics, by the task's own steps."""
    trainer = make_trainer(config, logger=False, enable_checkpointing=False)
    [validated] = trainer.validate(task, data, verbose=False)
    [tested] = trainer.test(task, data, verbose=False)
    return {**validated, **tested}
