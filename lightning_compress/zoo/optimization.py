"""How the tasks of the zoo are optimized: the optimizer, and its learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn, optim

from lightning_compress.wording import require_choice

__all__ = ["OptimizerName", "ScheduleName", "check_optimization", "learning_rate_factor", "make_optimizer"]

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
ScheduleName = Literal["cosine", "step", "constant"]


def check_optimization(settings: Mapping[str, Any]) -> None:
    """Raise unless `make_optimizer` can do with the settings.

    Raises:
        ValueError: a setting is out of its range, or an unknown optimizer or schedule.
    """
    _check_choice("optimizer", settings["optimizer"], get_args(OptimizerName))
    _check_choice("schedule", settings["schedule"], get_args(ScheduleName))
    _check_range("lr", settings["lr"], 0 < settings["lr"] < math.inf, "above 0")
    _check_range("momentum", settings["momentum"], 0 <= settings["momentum"] < 1, "in [0, 1)")
    _check_range("weight_decay", settings["weight_decay"], 0 <= settings["weight_decay"] < math.inf, "0 or above")
    _check_range("warmup", settings["warmup"], 0 <= settings["warmup"] < 1, "in [0, 1), a fraction of the run")


def make_optimizer(module: L.LightningModule) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns, of a module with `lr`, `schedule` and so on among its hyperparameters.

    Raises:
        ValueError: the schedule needs the length of the run, and the Trainer knows none.
    """
    settings: Any = module.hparams
    optimizer = _optimizer(settings.optimizer, settings)(module.parameters())
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        if settings.schedule == "constant" and not settings.warmup:
            return optimizer
        raise ValueError(
            "the learning rate's schedule needs to know how long the run is: give the Trainer `max_epochs` or "
            '`max_steps`, or the task schedule="constant" and warmup=0'
        )
    factor = partial(learning_rate_factor, steps=int(steps), schedule=settings.schedule, warmup=settings.warmup)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int, steps: int, schedule: ScheduleName, warmup: float) -> float:
    """What the highest learning rate is multiplied by at one step of a run.

    Args:
        step: the step, from 0.
        steps: how many there are.
        schedule: "cosine" (Loshchilov and Hutter 2016, arXiv 1608.03983), "step" or "constant".
        warmup: fraction of the run in which the rate rises linearly, the first step being above zero.

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(learning_rate_factor(step, 8, "cosine", 0.25), 2) for step in range(9)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07, 0.0]
        >>> [learning_rate_factor(step, 4, "step", 0.0) for step in range(4)]
        [1.0, 1.0, 0.1, 0.01]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "cosine":
        # a finished run may be asked once more than it has steps
        progress = min(1.0, (step - rising) / max(1, steps - rising))
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 0.01 if step >= 0.75 * steps else 0.1 if step >= 0.5 * steps else 1.0
    return 1.0


def _optimizer(name: OptimizerName, settings: Any) -> Callable[[Iterable[nn.Parameter]], optim.Optimizer]:
    decay = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if name == "sgd":
        return partial(optim.SGD, **decay, momentum=settings.momentum, nesterov=settings.momentum > 0)
    if name == "rmsprop":
        return partial(optim.RMSprop, **decay, momentum=settings.momentum)
    return partial(optim.Adam if name == "adam" else optim.AdamW, **decay)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require_choice(name, value, choices)


def _check_range(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {value}")
