"""What runs gave, and the JSON file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command
from lightning_compress.files import write_atomic

__all__ = ["Found", "Results", "Rows", "mean_of", "refusal"]

Rows = dict[str, dict[str, dict[str, Any]]]
"""Case -> side -> metrics."""


@dataclass(frozen=True)
class Found:
    """What a run gave: a value of each metric for a case and a side.

    Attributes:
        case: of the JSON file.
        side: likewise.
        metrics: name -> value; `refused` says why there is none.
        seed: the run's, where there are several; its metrics become lists.
    """

    case: str
    side: str
    metrics: dict[str, Any]
    seed: int | None = None


def refusal(error: Exception) -> dict[str, str]:
    """The metrics of a run that ended in an error: why, on one line."""
    return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


class Results:
    """The JSON file: the recipe, and the metrics of each side of each case.

    Where a side was run with several seeds, its metrics are lists: `metrics["seed"][i]` belongs to the i-th value of
    the others. `refused` is why a side has no others.

    Args:
        benchmark: its name.
        path: the file; read if it exists.
        recipe: a file of another one is refused.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, benchmark: str, path: Path, recipe: dict[str, Any]) -> None:
        self.benchmark = benchmark
        self.path, self.recipe = path, json.loads(json.dumps(recipe))
        self.rows: Rows = {}
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("recipe") != self.recipe:
                raise ValueError(f"{path} holds results of another recipe: give another --json FILE, or delete it")
            for row in found["rows"]:
                self.rows.setdefault(row["case"], {})[row["side"]] = row["metrics"]

    def has(self, case: str, side: str | None = None, seed: int | None = None) -> bool:
        """Whether a run is there already; without a side, whether anything of the case is."""
        sides = self.rows.get(case, {})
        if side is None:
            return bool(sides)
        metrics = sides.get(side)
        return metrics is not None and (seed is None or "refused" in metrics or seed in metrics["seed"])

    def add(self, found: Iterable[Found]) -> None:
        """Keep runs, and write the file."""
        for run in found:
            sides = self.rows.setdefault(run.case, {})
            if run.seed is None or "refused" in run.metrics:
                sides[run.side] = run.metrics
            else:
                metrics = sides.setdefault(run.side, {"seed": []})
                metrics["seed"].append(run.seed)
                for name, value in run.metrics.items():
                    metrics.setdefault(name, []).append(value)
        self.write()

    def write(self) -> None:
        """All of it, at once."""
        data = {
            "benchmark": self.benchmark,
            "command": command(),
            "torch": torch.__version__,
            "recipe": self.recipe,
            "rows": [
                {"case": case, "side": side, "metrics": metrics}
                for case, sides in self.rows.items()
                for side, metrics in sides.items()
            ],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(data, indent=1) + "\n")


def mean_of(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in %."""
    found = 100 * torch.tensor(values, dtype=torch.float64)
    return f"{found.mean():.2f}" + (f" ± {found.std():.2f}" if len(values) > 1 else "")
