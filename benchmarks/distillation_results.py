"""What the runs of the distillation benchmark gave: the JSON file, and the tables made of it."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import command
from benchmarks.distillation_runs import DATA, Row
from benchmarks.distillation_sides import ALONE, PAIRS, PLAIN, SIDES
from lightning_compress.files import write_atomic

__all__ = ["NOISE", "Results", "difference", "print_tables"]

NOISE = 2.0  # standard errors below which a difference is called noise
METRICS = [field.name for field in fields(Row) if field.name not in ("data", "pair", "side")]


class Results:
    """The JSON file: the recipes, and what each run gave.

    Its rows are one for each case and side, with lists of the values of all seeds: `metrics["seed"][i]` belongs to
    `metrics["accuracy"][i]`. Rows of the overhead hold lists over blocks.

    Args:
        path: the file; read if it exists.
        recipes: by pair; a file of other recipes is refused.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, recipes: dict[str, Any]) -> None:
        self.path = path
        self.recipes = recipes
        self.runs: list[Row] = []
        self.overhead: list[dict[str, Any]] = []
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("recipes") != recipes:
                raise ValueError(f"{path} holds results of other recipes: give another --json FILE, or delete it")
            for row in found["rows"]:
                if "seed" in row["metrics"]:
                    self.runs += _runs(row)
                else:
                    self.overhead.append(row)

    def add(self, run: Row) -> None:
        """Keep one more run; a teacher that was only read again is there already."""
        if run not in self.runs:
            self.runs.append(run)
        self.write()

    def write(self) -> None:
        """All of it, at once."""
        grouped: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: {name: [] for name in METRICS})
        for run in self.runs:
            for name, values in grouped[f"{run.data}, {run.pair}", run.side].items():
                values.append(getattr(run, name))
        rows = [{"case": case, "side": side, "metrics": metrics} for (case, side), metrics in grouped.items()]
        data = {
            "benchmark": "distillation",
            "command": command(),
            "torch": torch.__version__,
            "recipes": self.recipes,
            "rows": rows + self.overhead,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(data, indent=1) + "\n")


def _runs(row: dict[str, Any]) -> list[Row]:
    data, pair = row["case"].split(", ")
    values = zip(*(row["metrics"][name] for name in METRICS), strict=True)
    return [Row(data=data, pair=pair, side=row["side"], **dict(zip(METRICS, v, strict=True))) for v in values]


def difference(ours: dict[int, float], base: dict[int, float]) -> str:
    """Percentage points between two sides, seed by seed, with the standard error of their mean."""
    pairs = [100 * (ours[seed] - base[seed]) for seed in ours if seed in base]
    if not pairs:
        return ""
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.2f} (one seed)"
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.2f} ± {error:.2f}" + (" (noise)" if abs(mean) < NOISE * error or mean == 0 else "")


def print_tables(results: Results, console: Console) -> None:
    """One table for each data set and pair, in Markdown."""
    cells: dict[tuple[str, str], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for run in results.runs:
        cells[run.data, run.pair][run.side][run.seed] = run
    for data in DATA:
        for pair in PAIRS:
            if (data, pair) in cells:
                found = cells[data, pair]
                console.print(_caption(f"{DATA[data]}, {PAIRS[pair].title}", found, results.recipes[pair]))
                console.print(_table(found))
    console.print(
        "Top-1 on the whole test set after the last epoch, mean ± standard deviation over the seeds, in %. Differences "
        f"are taken seed by seed, in percentage points, ± their standard error; (noise): below {NOISE:g} of them. "
        "CPU s: processor time of one training, median."
    )


def _caption(title: str, found: dict[str, dict[int, Row]], recipe: dict[str, Any]) -> str:
    def seen(samples: int | None, epochs: int, augment: bool) -> str:
        images = "all training images" if samples is None else f"{samples:,} training images"
        return f"{images}, {epochs} epochs" + (", shifted and mirrored" if augment else "")

    size = f"{recipe['image_size']} pixels wide" if recipe["image_size"] else "as they are"
    accuracy = next(iter(found["teacher"].values())).accuracy
    taught = seen(recipe["teacher_samples"], recipe["teacher_epochs"], True)
    learned = seen(recipe["samples"], recipe["epochs"], recipe["augment"])
    return (
        f"**{title}.** Teacher: {accuracy:.2%}, width {recipe['teacher_width']:g}, {taught}. "
        f"Students: width {recipe['student_width']:g}, {learned}. Images {size}."
    )


def _table(found: dict[str, dict[int, Row]]) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("side", "seeds", "accuracy", f"− {ALONE}", f"− {PLAIN}", "CPU s"):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    scores = {side: {seed: run.accuracy for seed, run in found[side].items()} for side in SIDES if side in found}
    for side, by_seed in scores.items():
        values = [100 * value for value in by_seed.values()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        differences = ("" if side == base else difference(by_seed, scores.get(base, {})) for base in (ALONE, PLAIN))
        seconds = statistics.median(run.cpu_seconds for run in found[side].values())
        table.add_row(side, str(len(values)), f"{statistics.mean(values):.2f}{spread}", *differences, f"{seconds:.0f}")
    return table
