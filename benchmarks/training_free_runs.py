"""One run of the training-free benchmark: a network compressed and tested, or compressed and trained a little."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.distillation_runs import Place, start_worker
from benchmarks.distillation_sides import KD_TASK, KD_TEMPERATURE, KD_WEIGHT
from benchmarks.results import Found, refusal
from benchmarks.training_free_nets import (
    CLASSES,
    Cell,
    accuracy,
    calibration_images,
    dense_network,
    images,
    train_dense,
    trainer,
)
from benchmarks.training_free_sides import OPERATORS, compress, compressing, variants_of
from lightning_compress import Distillation, measure
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = [
    "ALL_LAYERS",
    "DENSE",
    "RECOVERY_BATCH",
    "RECOVERY_STEPS",
    "Task",
    "recover",
    "run_dense",
    "run_untrained",
    "start",
    "tasks_of",
    "to_recover",
]

ALL_LAYERS = "all layers"
DENSE = "dense"
RECOVERY_STEPS, RECOVERY_BATCH = 200, 64
RECOVERY_LR = 0.02
RECOVERED = {
    "vgg_small": ("depthwise-separable", "spatial"),
    "resnet20": ("spatial",),
    "mobilenetv2_small": ("channel",),
}
RECOVERY_BUDGET = 0.33
RECOVERY_VARIANTS = ("data", "weights", "random")
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError)
"""What a side may raise on a network that it cannot compress; the table says so instead of stopping."""


@dataclass(frozen=True)
class Task:
    """A network to compress: which, how, and to what.

    Attributes:
        cell: the network and its data.
        operator: a key of `OPERATORS`.
        variant: a key of `VARIANTS`.
        budget: fraction of the multiply-accumulates; None: every layer that the operator takes.
    """

    cell: Cell
    operator: str
    variant: str
    budget: float | None

    @property
    def where(self) -> str:
        """The budget in words."""
        return ALL_LAYERS if self.budget is None else f"MACs {self.budget:g}"

    @property
    def case(self) -> str:
        """Of the JSON file."""
        return f"accuracy without training; {self.cell.case}; {self.where}"

    @property
    def recovery_case(self) -> str:
        """Of the JSON file, after training."""
        return f"accuracy after {RECOVERY_STEPS} steps; {self.cell.case}; {self.operator}; {self.where}"

    @property
    def side(self) -> str:
        """Of the JSON file."""
        owner = "" if OPERATORS[self.operator].peer else "ours "
        return f"{owner}{self.operator}; {self.variant}"


def start(threads: int) -> None:
    """What a process does before its first run."""
    start_worker(threads)
    warnings.filterwarnings("ignore", module="tensorly")


def tasks_of(cell: Cell, operators: list[str], variants: list[str]) -> Iterator[Task]:
    """Everything that is tested without training, of one network."""
    for operator in operators:
        found = OPERATORS[operator]
        budgets: list[float | None] = [*cell.recipe.budgets[cell.net]]
        if found.kind == "compact":  # there is little to choose from: a layer is replaced or not
            budgets = [*(budgets[:1] if found.budgets else []), None]
        for budget in budgets:
            for variant in variants_of(operator):
                if variant in variants:
                    yield Task(cell, operator, variant, budget)


def to_recover(cell: Cell, operators: list[str]) -> Iterator[Task]:
    """Everything that is trained after it was compressed, of one network."""
    if cell.net not in cell.recipe.recovery.get(cell.data, ()):
        return
    for operator in RECOVERED[cell.net]:
        if operator in operators:
            budget = None if OPERATORS[operator].kind == "compact" else RECOVERY_BUDGET
            for variant in RECOVERY_VARIANTS:
                yield Task(cell, operator, variant, budget)


def run_dense(cell: Cell, place: Place) -> Found:
    """Train the dense network, or read it, and measure it."""
    dense = train_dense(cell, place)
    cost = measure(dense.net, calibration_images(cell, place)[:1])
    metrics = {"accuracy": dense.accuracy, "macs": cost.macs, "params": cost.params, "seconds": dense.seconds}
    return Found(f"{DENSE}; {cell.case}", DENSE, metrics)


def run_untrained(task: Task, place: Place) -> Found:
    """Compress without training and test."""
    return Found(task.case, task.side, _try(lambda: _untrained(task, place)))


def recover(task: Task, place: Place, seed: int) -> Found:
    """Compress, train a little with distillation from the dense network, and test."""
    return Found(task.recovery_case, task.side, _try(lambda: _recovered(task, place, seed)), seed)


def _try(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except REFUSALS as error:
        return refusal(error)


def _compressed(task: Task, place: Place) -> tuple[nn.Module, dict[str, Any]]:
    dense = dense_network(task.cell, place)
    x = calibration_images(task.cell, place)
    wall, cpu = time.perf_counter(), time.process_time()
    done = compress(dense.net, task.operator, task.variant, task.budget, x)
    seconds = {"compress_seconds": time.perf_counter() - wall, "compress_cpu_seconds": time.process_time() - cpu}
    cost, before = measure(done.net, x[:1]), measure(dense.net, x[:1])
    return done.net, {
        "macs": cost.macs,
        "macs_fraction": cost.macs / before.macs,
        "params": cost.params,
        "params_fraction": cost.params / before.params,
        "replaced": done.replaced,
        "left": len(done.left),
        **seconds,
    }


def _untrained(task: Task, place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    net, metrics = _compressed(task, place)
    return {"accuracy": accuracy(net, task.cell.data, place), **metrics}


def _recovered(task: Task, place: Place, seed: int) -> dict[str, Any]:
    """As a user would: one callback that compresses before the first step, one that lets the dense network teach."""
    cell, recipe = task.cell, task.cell.recipe
    dense = dense_network(cell, place)
    data = images(cell.data, place, recipe.samples, recipe.augment, RECOVERY_BATCH)
    L.seed_everything(seed, workers=True, verbose=False)
    net = copy.deepcopy(dense.net).train()
    begin = AtTheBeginning(lambda: accuracy(net, cell.data, place))
    losses = {"kd": Term(KD(temperature=KD_TEMPERATURE), KD_WEIGHT)}
    teaching = Distillation("self", losses, task_weight=KD_TASK, metrics=False)
    wall = time.perf_counter()
    trainer(
        max_steps=RECOVERY_STEPS,
        accelerator=place.accelerator,
        callbacks=[compressing(task.operator, task.variant, task.budget), teaching, begin],
    ).fit(ImageClassifier(net, CLASSES, lr=RECOVERY_LR), data)
    seconds = time.perf_counter() - wall
    net = net.cpu()
    after = accuracy(net, cell.data, place)
    image = calibration_images(cell, place)[:1]
    cost, before = measure(net, image), measure(dense.net, image)
    return {
        "accuracy": after,
        "accuracy_before": begin.found,
        "lr": RECOVERY_LR,
        "seconds": seconds,
        "macs": cost.macs,
        "macs_fraction": cost.macs / before.macs,
        "params": cost.params,
        "params_fraction": cost.params / before.params,
    }


class AtTheBeginning(L.Callback):
    """Asks something as soon as the network was edited, before it is trained.

    Args:
        ask: what to ask.
    """

    def __init__(self, ask: Callable[[], float]) -> None:
        self.ask, self.found = ask, float("nan")

    def after_edits(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """See `CompressionCallback`."""
        training = pl_module.training
        self.found = self.ask()
        pl_module.train(training)
