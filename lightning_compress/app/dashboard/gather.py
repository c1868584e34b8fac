"""From a folder to plain data: which runs lie below it, how far they came, and what they came to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.app.dashboard.curves import Curves, read_curves
from lightning_compress.app.dashboard.layers import Layer, layer_table, read_manifest
from lightning_compress.app.dashboard.quantities import costs, metrics
from lightning_compress.app.dashboard.reading import DamagedFileError, items, number, read_json, section, text

__all__ = ["Details", "Run", "find_jobs", "gather", "read_run"]

RESULTS, JOB = "results.json", "job.json"
_OVERRIDE = re.compile(r",(?=[~+]*[\w@./:-]+=)")  # the commas between overrides, not those in their values
_SAID = re.compile(r"^(arch|method|recipe|data|experiment)=|^method\.(?=.*=)")  # what the value says by itself
_SKIPPED = ("cache", "checkpoints", "pictures")


@dataclass
class Details:
    """What is shown of a run once it is opened.

    Attributes:
        layers: see `layers.Layer`.
        frozen: why a tensor was never cut -> which.
        edits: method -> how many edits it made.
        curves: see `curves.Curves`.
        pictures: files with pictures.
        artifact: the file of the compressed network, if it is there.
        note: what is to be said of it, if it cannot be read or where the metric comes from.
        config: the configuration.
        environment: where it ran.
    """

    layers: list[Layer] = field(default_factory=list)
    frozen: dict[str, list[str]] = field(default_factory=dict)
    edits: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    artifact: Path | None = None
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A job's folder.

    Attributes:
        folder: where it is.
        name: the job's overrides, or the folder's name.
        status: `finished`, `failed`, `unfinished` or `unreadable`.
        label: the name without what all runs have in common.
        arch: the network.
        method: how it was compressed.
        data: what it was trained on.
        dense: quantity -> value before anything was cut.
        final: quantity -> value now; that of the dense network where nothing was compressed.
        compressed: whether anything was.
        budgets: `unit`, `callback`, `requested` and `reached`.
        command: what repeats it; empty if that was not written down.
        seconds: how long it took.
        error: what went wrong.
        details: what is shown once it is opened.
    """

    folder: Path
    name: str
    status: str
    label: str = ""
    arch: str = ""
    method: str = ""
    data: str = ""
    dense: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    compressed: bool = False
    budgets: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    seconds: float | None = None
    error: str = ""
    details: Details = field(default_factory=Details)


def gather(folder: Path) -> list[Run]:
    """All runs below a folder, by name.

    Args:
        folder: searched with all that is in it, but for hidden folders and `cache`.
    """
    jobs = list(find_jobs(folder))
    points = max(40, min(300, 60_000 // max(1, len(jobs))))  # a page of a thousand runs is to stay one that opens
    runs = sorted((read_run(job, points) for job in jobs), key=lambda run: (run.name, str(run.folder)))
    _label(runs, folder)
    return runs


def find_jobs(folder: Path) -> Iterator[Path]:
    """The folders with a job in them, at or below `folder`."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        if RESULTS in files or JOB in files:
            yield Path(path)


def read_run(folder: Path, points: int = 300) -> Run:
    """Read a job's folder; what is damaged in it makes it `unreadable`, with the reason as its error.

    Args:
        folder: holds `results.json`, `job.json` or both.
        points: of each training curve at most.
    """
    run = Run(folder, folder.name, "unreadable")
    try:
        _read(run, points)
    except DamagedFileError as error:
        run.status, run.error = "unreadable", str(error)
    return run


def _read(run: Run, points: int) -> None:
    folder = run.folder
    begun = read_json(folder / JOB) if (folder / JOB).is_file() else None
    results = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    # A report writes results before a job has tested its networks; alone, outside of a job, it says all there is.
    finished = bool(results) and ("metrics" in results or begun is None)
    job = section(results, "job") or section(begun or {}, "job")
    run.name = text(job.get("name")) or folder.name
    run.command, run.seconds = text(job.get("command")), number(job.get("seconds"))
    config = section(results, "config")
    _place(run, job, config, results)
    if not finished:
        begun = begun or {}
        run.status = "failed" if begun.get("status") == "failed" else "unfinished"
        run.error = text(begun.get("error"))
        return
    if results.get("format") != 1:
        raise DamagedFileError(f"{RESULTS}: expected format 1, got {results.get('format')!r}")
    run.dense = {**metrics(results, "dense"), **costs(results, "dense")}
    run.compressed = results.get("compressed") is not None
    run.final = {**metrics(results, "final"), **costs(results, "compressed" if run.compressed else "dense")}
    if not run.dense:
        raise DamagedFileError(f"{RESULTS}: `dense` has no figures")
    run.budgets = [_budget(row) for row in items(results, "budgets")]
    run.details = _details(folder, results, config, points)
    run.status = "finished"


def _place(run: Run, job: dict[str, Any], config: dict[str, Any], results: dict[str, Any]) -> None:
    """Arch, method and data: as the job chose them, or else as its folder's name, its configuration or edits tell."""
    named = dict(part.split("=", 1) for part in _OVERRIDE.split(run.name) if "=" in part)
    choices = {**named, **{name: value for name, value in section(job, "choices").items() if isinstance(value, str)}}
    targets = {name: text(section(config, name).get("_target_")).rpartition(".")[2] for name in ("arch", "data")}
    recipe = config.get("recipe")
    used = [text(node.get("_target_")).rpartition(".")[2] for node in _nodes(recipe)]
    run.arch = choices.get("arch") or targets["arch"] or text(results.get("network")) or run.folder.name
    run.data = choices.get("data") or targets["data"]
    chosen = choices.get("recipe", "single")
    run.method = choices.get("method", "") if chosen == "single" else chosen
    run.method = run.method or " + ".join(used) or " + ".join(section(results, "edits")) or "none"
    if choices.get("distill", "none") != "none":
        run.method += f" + distill={choices['distill']}"


def _nodes(recipe: object) -> list[dict[str, Any]]:
    values = recipe.values() if isinstance(recipe, dict) else ()
    return [node for node in values if isinstance(node, dict)]


def _budget(row: dict[str, Any]) -> dict[str, Any]:
    requested, reached = number(row.get("requested")), number(row.get("reached"))
    if requested is None:
        raise DamagedFileError(f"`budgets`: `requested` must be a number, got {row.get('requested')!r}")
    return {
        "unit": text(row.get("unit")),
        "callback": text(row.get("callback")),
        "requested": requested,
        "reached": reached,
    }


def _details(folder: Path, results: dict[str, Any], config: dict[str, Any], points: int) -> Details:
    name = text(results.get("artifact"))
    artifact = folder / name if name and (folder / name).is_file() else None
    note, manifest = "", None
    if artifact is not None and results.get("compressed") is not None:
        try:
            manifest = read_manifest(artifact)
        except DamagedFileError as error:  # the figures of the run hold all the same
            note = str(error)
    frozen: dict[str, list[str]] = {}
    for tensor, reason in section(results, "frozen").items():
        frozen.setdefault(str(reason), []).append(tensor)
    return Details(
        layers=layer_table(results, manifest),
        frozen=frozen,
        edits=section(results, "edits"),
        curves=read_curves(folder, points),
        pictures=sorted((folder / "pictures").rglob("*.png")),
        artifact=artifact,
        note=note or text(section(results, "metric").get("note")),
        config=config,
        environment=section(results, "environment"),
    )


def _place_in_name(part: str) -> int:
    """Arch, then method, then the rest as it was given."""
    return next((place for place, name in enumerate(("arch=", "method=")) if part.startswith(name)), 2)


def _label(runs: list[Run], folder: Path) -> None:
    """Short names: without the overrides that all share, and with the folder where two would be alike."""
    parts = {id(run): _OVERRIDE.split(run.name) for run in runs}
    seen = Counter(part for own in parts.values() for part in set(own))
    for run in runs:
        own = [part for part in parts[id(run)] if seen[part] < len(runs) or len(runs) == 1]
        own = [_SAID.sub("", part) for part in sorted(own, key=_place_in_name)]
        run.label = ", ".join(own) or run.name
    alike = Counter(run.label for run in runs)
    for run in runs:
        if alike[run.label] > 1:
            run.label = f"{run.label} ({run.folder.relative_to(folder).parent.as_posix()})"
