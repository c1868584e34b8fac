"""The parts of a report that are read off two networks and a Trainer."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_compress.budget import Budget
from lightning_compress.edits import named_tensors, skeleton
from lightning_compress.footprint import Footprint
from lightning_compress.methods.measured import BUDGET_BATCH
from lightning_compress.methods.quantization import quantization_buffers
from lightning_compress.results import BudgetRow, LayerRow

__all__ = ["blank", "budget_rows", "environment", "layer_rows"]


def blank(dense: nn.Module) -> nn.Module:
    """The dense structure with none of its weights: what the artifact does not bring shows as not-a-number."""
    blank = skeleton(dense, torch.clone)
    for tensor in blank.state_dict().values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return blank


def layer_rows(dense: nn.Module, compressed: nn.Module, before: Footprint, after: Footprint) -> tuple[LayerRow, ...]:
    """The tensors whose shape differs between two networks, whatever edits made it so; not what rounding brings."""
    old = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense)}
    new = {name: tuple(tensor.shape) for name, tensor in named_tensors(compressed)}
    rows = []
    beside = set(quantization_buffers(compressed))
    for name in dict.fromkeys([*old, *new]):
        if name not in beside and old.get(name) != new.get(name):
            layer = name.rpartition(".")[0]
            macs = before.layers.get(layer, 0), after.layers.get(layer, 0)
            rows.append(LayerRow(name, old.get(name), new.get(name), *macs))
    return tuple(rows)


def budget_rows(trainer: L.Trainer, dense: Footprint, compressed: Footprint) -> tuple[BudgetRow, ...]:
    """What the Trainer's callbacks were asked for, and what was measured."""
    rows = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        budget = getattr(callback, "budget", None)
        if not isinstance(budget, Budget):
            continue
        for unit, requested in budget.given().items():
            old, new = _cost(dense, unit), _cost(compressed, unit)
            reached = None if old is None or new is None else new / old if requested <= 1 else new
            rows.append(BudgetRow(type(callback).__name__, unit, requested, reached))
    return tuple(rows)


def _cost(footprint: Footprint, unit: str) -> float | None:
    if unit == "latency":  # in microseconds and at the batch size that budgets have; None if that was not timed
        times = footprint.latency.get(BUDGET_BATCH)
        return None if times is None else 1000 * times.wall.median
    cost: float = getattr(footprint, unit)
    return cost


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """What one has to know to repeat the run or to compare it."""
    import lightning_compress

    device = trainer.strategy.root_device
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "lightning_compress": lightning_compress.__version__,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "seed": None if seed is None else int(seed),
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
    }
