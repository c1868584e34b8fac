"""What a callback costs a training step: pruning of channels while it waits, masks and shared values while they hold.

    python benchmarks/overhead.py [--quick] [--json FILE]

Two sides, a Lightning run with the callback and one without, take turns in blocks of steps. No edit falls into the time
measured: the first of channel pruning is due much later, those of weights before the first step. A step lasts from the
end of one batch to the end of the next, so that all hooks and the loop around them are in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import command
from lightning_compress import Budget, ChannelPruning, WeightPruning, WeightSharing
from lightning_compress.zoo.feedforward import resnet20
from lightning_compress.zoo.tasks import ImageClassifier

EPOCHS = 1000
WARM_UP = 3  # steps of each block that are not counted


@dataclass(frozen=True)
class Case:
    """A callback, and what it may cost.

    Attributes:
        make: makes it.
        accepted: largest ratio of processor times, with it and without.
    """

    make: Callable[[], L.Callback]
    accepted: float


def waiting(**options: Any) -> Case:
    """Channel pruning whose first edit is far away; in a step only some have anything to do."""
    return Case(lambda: ChannelPruning(Budget(macs=0.5), start=EPOCHS - 2, end=EPOCHS - 1, **options), 1.02)


CASES = {
    "channel pruning, l2": waiting(),
    "channel pruning, bn_scale": waiting(criterion="bn_scale", regularization="slimming"),
    "channel pruning, group norm": waiting(regularization="group_norm"),
    "channel pruning, growing": waiting(regularization="growing"),
    "channel pruning, taylor": waiting(criterion="taylor"),
    "masks": Case(lambda: WeightPruning(0.9, start=0.0, schedule="one_shot"), 1.05),
    "shared values": Case(lambda: WeightSharing(5, start=0.0), 1.3),
}
QUICK = ("channel pruning, l2", "masks", "shared values")


class StepTimer(L.Callback):
    """Times the steps of one block, then stops the run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))
        trainer.should_stop = len(self.marks) == self.steps + WARM_UP + 1

    def times(self) -> list[tuple[float, float]]:
        """Wall and processor seconds of each step counted."""
        marks = self.marks[WARM_UP:]
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]


@dataclass
class Times:
    """Seconds per step: one median for each block."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What one side costs.

    Attributes:
        wall_seconds: median over the blocks.
        cpu_seconds: the same in processor time, which other work on the machine disturbs less.
        wall_ratio: to the other side's block beside it, median over the blocks.
        cpu_ratio: the same in processor time.
        hook_seconds: time inside the callback's own hooks, per step.
    """

    wall_seconds: float
    cpu_seconds: float
    wall_ratio: float = 1.0
    cpu_ratio: float = 1.0
    hook_seconds: float = 0.0


def fit(callback: L.Callback | None, steps: int, batch: tuple[Tensor, Tensor], profiler: Any = None) -> StepTimer:
    """One block: a fresh run of a few steps."""
    torch.manual_seed(0)
    timer = StepTimer(steps)
    task = ImageClassifier(resnet20(in_channels=1), num_classes=10, lr=0.01, schedule="constant")
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([callback] if callback else []), timer],
        profiler=profiler,
    )
    trainer.fit(task, DataLoader([batch] * (steps + WARM_UP + 1), batch_size=None))
    return timer


def in_hooks(case: Case, steps: int, batch: tuple[Tensor, Tensor]) -> float:
    """Seconds per step inside the callback's own hooks, those of the first step left out: it may prepare something."""
    profiler = SimpleProfiler()
    callback = case.make()
    fit(callback, steps, batch, profiler)
    name = f"[Callback]{type(callback).__name__}"
    spent = [d for n, d in profiler.recorded_durations.items() if n.startswith(name) and len(d) >= steps]
    return sum(statistics.mean(durations[1:]) for durations in spent)


def compare(case: Case, repeats: int, steps: int, batch: tuple[Tensor, Tensor]) -> dict[str, Row]:
    """Both sides in turns; which is first alternates."""
    times = {"with": Times(), "without": Times()}
    for repeat in range(repeats):
        for side in list(times) if repeat % 2 == 0 else list(times)[::-1]:
            block = fit(case.make() if side == "with" else None, steps, batch).times()
            times[side].wall.append(statistics.median(wall for wall, _ in block))
            times[side].cpu.append(statistics.median(cpu for _, cpu in block))
    with_, without = times["with"], times["without"]
    ratios = (
        statistics.median(a / b for a, b in zip(getattr(with_, unit), getattr(without, unit), strict=True))
        for unit in ("wall", "cpu")
    )
    return {
        "with": Row(statistics.median(with_.wall), statistics.median(with_.cpu), *ratios, in_hooks(case, steps, batch)),
        "without": Row(statistics.median(without.wall), statistics.median(without.cpu)),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and blocks")
    parser.add_argument("--repeats", type=int, help="blocks of each side; 4 with --quick, else 10")
    parser.add_argument("--steps", type=int, help="steps counted in each block; 8 with --quick, else 12")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CALLBACK", help="of: %(choices)s")
    parser.add_argument("--batch", type=int, default=128, help="images in a step; here: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with one, times repeat best")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="training ended before .* last edit")
    repeats = options.repeats or (4 if options.quick else 10)
    steps = options.steps or (8 if options.quick else 12)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 1, 28, 28, generator=generator)
    batch = (images, torch.randint(10, (options.batch,), generator=generator))
    cases = {name: CASES[name] for name in options.only or (QUICK if options.quick else CASES)}

    fit(None, 1, batch)  # what the first run of a process loads belongs to neither side
    found = {name: compare(case, repeats, steps, batch) for name, case in cases.items()}

    table = Table(
        title=f"ResNet-20, batch {options.batch} of 1×28×28, {repeats} blocks of {steps} steps, "
        f"{options.threads} thread(s)"
    )
    for column in ("callback", "side", "wall ms", "CPU ms", "wall ratio", "CPU ratio", "in hooks, µs"):
        table.add_column(column, justify="left" if column in ("callback", "side") else "right")
    for name, sides in found.items():
        for side, row in sides.items():
            ratios = (f"{row.wall_ratio:.3f}", f"{row.cpu_ratio:.3f}", f"{row.hook_seconds * 1e6:.0f}")
            figures = (
                f"{row.wall_seconds * 1e3:.1f}",
                f"{row.cpu_seconds * 1e3:.1f}",
                *(ratios if side == "with" else ()),
            )
            table.add_row(name if side == "with" else "", side, *figures)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, case in cases.items():
        ratio = found[name]["with"].cpu_ratio
        verdict = "passed" if ratio <= case.accepted else "MISSED"
        console.print(f"{name}: ratio of CPU time {ratio:.3f}, accepted {case.accepted}: {verdict}")
    if options.json:
        rows = [
            {"case": name, "side": side, "metrics": asdict(row)}
            for name, sides in found.items()
            for side, row in sides.items()
        ]
        data = {"benchmark": "overhead", "command": command(), "rows": rows}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
