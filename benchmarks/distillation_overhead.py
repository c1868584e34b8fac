"""What the `Distillation` callback costs a training step, beside knowledge distillation written by hand.

Blocks of steps take turns, as in `overhead.py`: a run without a teacher, one with the teacher and the loss in
`training_step`, one with the callback; and blocks of the teacher's forward pass alone, without gradients.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.distillation_sides import KD_TASK, KD_TEMPERATURE, KD_WEIGHT, PAIRS, PLAIN, SIDES
from benchmarks.overhead import WARM_UP, StepTimer, Times
from lightning_compress import Distillation
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = ["compare", "print_overhead"]

ACCEPTED = 1.02
PAIR = "resnet"
NONE, BY_HAND, CALLBACK, FORWARD = "no distillation", "by hand", "the callback", "the teacher's forward alone"
UNITS = {"wall_seconds": "wall", "cpu_seconds": "CPU"}
Batch = tuple[Tensor, Tensor]


class ByHand(ImageClassifier):
    """What one writes without the callback: the same terms, logged alike."""

    def __init__(self, net: nn.Module, teacher: nn.Module, **options: Any) -> None:
        super().__init__(net, **options)
        self.teachers = [teacher.eval()]  # in a list: no part of the module

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy and KD."""
        images, labels = batch
        with torch.no_grad():
            taught = self.teachers[0](images)
        logits = self.net(images)
        task = F.cross_entropy(logits, labels)
        student, teacher = (F.log_softmax(x / KD_TEMPERATURE, dim=1) for x in (logits, taught))
        kd = KD_WEIGHT * KD_TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = KD_TASK * task + kd
        for name, value in {"train/loss": loss, "distill/task": task, "distill/kd": kd}.items():
            self.log(name, value.detach(), on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return loss


def _fit(side: str, teacher: nn.Module, steps: int, batch: Batch) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    net = PAIRS[PAIR].student(batch[0].shape[1], 10, width=1.0)
    options: dict[str, Any] = {"num_classes": 10, "lr": 0.01, "schedule": "constant"}
    task = ByHand(net, teacher, **options) if side == BY_HAND else ImageClassifier(net, **options)
    timer = StepTimer(steps)
    callbacks: list[L.Callback] = [timer]
    if side == CALLBACK:
        build = SIDES[PLAIN].options
        assert build is not None
        callbacks.insert(0, Distillation(teacher, **build(PAIRS[PAIR]), metrics=False))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(task, DataLoader([batch] * (steps + WARM_UP + 1), batch_size=None))
    return timer.times()


def _forward(teacher: nn.Module, steps: int, batch: Batch) -> list[tuple[float, float]]:
    teacher.eval()
    marks = []
    with torch.no_grad():
        for _ in range(steps + WARM_UP + 1):
            teacher(batch[0])
            marks.append((time.perf_counter(), time.process_time()))
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks[WARM_UP:])]


def compare(repeats: int, steps: int, size: int, batch_size: int = 128) -> list[dict[str, Any]]:
    """All sides in turns; which comes first alternates.

    Args:
        repeats: blocks of each side, at least 2.
        steps: counted in each block.
        size: pixels of the images.
        batch_size: images in a batch.

    Returns:
        A row for each side: medians of a step's wall and processor time, one for each block.
    """
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(batch_size, 3, size, size, generator=generator),
        torch.randint(10, (batch_size,), generator=generator),
    )
    torch.manual_seed(1)
    teacher = PAIRS[PAIR].teacher(3, 10, width=1.0)
    times = {side: Times() for side in (NONE, BY_HAND, CALLBACK, FORWARD)}
    _fit(CALLBACK, teacher, 1, batch)  # what the first run of a process loads belongs to no side
    for repeat in range(repeats):
        order = list(times) if repeat % 2 == 0 else list(times)[::-1]
        for side in order:
            block = _forward(teacher, steps, batch) if side == FORWARD else _fit(side, teacher, steps, batch)
            times[side].wall.append(statistics.median(wall for wall, _ in block))
            times[side].cpu.append(statistics.median(cpu for _, cpu in block))
    case = (
        f"{PAIRS[PAIR].title}, batch {batch_size} of 3×{size}×{size}, {repeats} blocks of {steps} steps, "
        f"{torch.get_num_threads()} thread(s) of the CPU"
    )
    return [
        {"case": case, "side": side, "metrics": {"wall_seconds": t.wall, "cpu_seconds": t.cpu}}
        for side, t in times.items()
    ]


def print_overhead(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, and whether the ratios are what is accepted."""
    found = {row["side"]: row["metrics"] for row in rows}
    console.print(f"**Overhead.** {rows[0]['case']}.")
    table = Table(box=box.MARKDOWN)
    for column in ("side", "wall ms", "CPU ms"):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for side, metrics in found.items():
        table.add_row(side, *(f"{statistics.median(metrics[unit]) * 1e3:.1f}" for unit in UNITS))
    console.print(table)
    to_hand: dict[str, tuple[float, float, float]] = {}
    in_forwards: dict[str, tuple[float, float, float]] = {}
    for unit in UNITS:
        none, hand, callback, forward = (found[side][unit] for side in (NONE, BY_HAND, CALLBACK, FORWARD))
        to_hand[unit] = _quartiles([a / b for a, b in zip(callback, hand, strict=True)])
        more = zip(callback, none, forward, strict=True)
        in_forwards[unit] = _quartiles([(a - b) / c for a, b, c in more])
    for what, ratios, accepted in (
        ("The callback's step to that by hand", to_hand, ACCEPTED),
        ("What the callback adds to a step, in forward passes of the teacher", in_forwards, 1),
    ):
        figures = (
            f"{name} {ratios[unit][1]:.3f} (quartiles {ratios[unit][0]:.3f} to {ratios[unit][2]:.3f})"
            for unit, name in UNITS.items()
        )
        console.print(f"- {what}: {', '.join(figures)}; accepted: {accepted}")
    console.print(f"- CPU time by hand: {'passed' if to_hand['cpu_seconds'][1] <= ACCEPTED else 'MISSED'}")


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
