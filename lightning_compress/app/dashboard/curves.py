"""Training curves from the files of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Curves", "read_curves"]

Curves = dict[str, list[list[float]]]
"""Name -> [steps, values]."""


def read_curves(folder: Path, points: int = 300) -> Curves:
    """What was logged while a job trained.

    A resumed job begins another `version_N`, which may repeat steps of the one before: the later one says what counts.

    Args:
        folder: of the job; files that are missing or damaged are left out, line by line.
        points: how many of each curve at most; longer ones are thinned out evenly.

    Returns:
        The curves of at least two points: a figure that was logged once is none.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("metrics/version_*/metrics.csv"), key=_version):
        try:
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                for row in csv.DictReader(line.replace("\0", "") for line in file):
                    _take(row, found)
        except (OSError, csv.Error):
            continue  # a run is worth showing without its curves
    curves = {}
    for name, by_step in sorted(found.items()):
        if len(by_step) > 1:
            steps = sorted(by_step)
            stride = math.ceil(len(steps) / points)
            thin = steps[::-stride][::-1]  # from the end: the last value is the one that is compared
            curves[name] = [list(map(float, thin)), [float(f"{by_step[step]:.5g}") for step in thin]]
    return curves


def _take(row: Mapping[str | None, object], found: dict[str, dict[int, float]]) -> None:
    """One line of the file: whatever in it is a number, at its step."""
    try:
        step = int(float(str(row.get("step"))))
    except (ValueError, OverflowError):
        return
    for name, value in row.items():
        if name in (None, "step", "epoch") or not isinstance(value, str) or not value:
            continue  # DictReader keeps surplus cells in a list, under no name
        try:
            read = float(value)
        except ValueError:
            continue
        if math.isfinite(read):
            found.setdefault(str(name), {})[step] = read


def _version(path: Path) -> tuple[int, str]:
    number = path.parent.name.removeprefix("version_")
    return (int(number) if number.isdecimal() else 0, number)
