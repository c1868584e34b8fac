"""Dry steps: what a training step may leave behind is put back, and what would change anything ends it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.utils import _pytree as pytree
from torchmetrics import Metric

__all__ = ["StopStep", "dry_step"]


class StopStep(BaseException):
    """Ends a dry step; no `except Exception` of the user's may hold it up."""


class _DryOptimizer:
    """Stands in for an optimizer: all that would change anything ends the step."""

    def __init__(self, optimizer: LightningOptimizer) -> None:
        self._optimizer = optimizer

    def step(self, *_: Any, **__: Any) -> None:
        raise StopStep

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Nothing to clear: gradients are put back after the step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@contextmanager
def dry_step(module: pl.LightningModule) -> Iterator[None]:
    """Put back, on leaving, what a training step may leave behind."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    metrics = [
        (m, {name: copy.deepcopy(m.__dict__[name]) for name in _metric_state(m)})
        for m in module.modules()
        if isinstance(m, Metric)
    ]
    containers = [
        (m, name, copy.copy(value))
        for m in module.modules()
        for name, value in m.__dict__.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    ]
    patched: dict[str, Any] = {"log": _ignore, "log_dict": _ignore, "manual_backward": _stop}
    if not module.automatic_optimization:
        patched["optimizers"] = lambda *args, **kwargs: pytree.tree_map(
            lambda o: _DryOptimizer(o) if isinstance(o, LightningOptimizer) else o,
            type(module).optimizers(module, *args, **kwargs),
        )
    before = {name: module.__dict__[name] for name in patched if name in module.__dict__}
    for p, _, _ in parameters:
        p.grad = None
    module.__dict__.update(patched)
    try:
        yield
    finally:
        for name in patched:
            del module.__dict__[name]
        module.__dict__.update(before)
        for owner, name, value in containers:
            setattr(owner, name, value)
        for metric, state in metrics:
            metric.__dict__.update(state)
        for p, grad, requires_grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _metric_state(metric: Metric) -> list[str]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_is_synced", "_cache"]
    return [name for name in names if name in metric.__dict__]


def _ignore(*_: Any, **__: Any) -> None:
    return None


def _stop(*_: Any, **__: Any) -> None:
    raise StopStep
