"""What a sweep ends with: one table of all its jobs, failed ones included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.app.jobs import read_results, write_json

__all__ = ["SweepJob", "SweepTable", "sweep_table"]


class SweepJob(NamedTuple):
    """One job of a sweep, as its table needs it.

    Attributes:
        name: its overrides.
        folder: where it wrote.
        error: the first line of what went wrong; None if nothing did.
    """

    name: str
    folder: Path
    error: str | None


class SweepTable(Callback):
    """A Hydra callback that prints the table of a sweep.

    Hydra tells `on_multirun_end` nothing of the jobs, which may have run in other processes. So each job leaves a
    note under a name that all jobs of one sweep share, and the sweep's own process gathers them.

    Args:
        sweep: a name resolved once for the whole sweep, e.g. `${now:...}`.
    """

    _pending: ClassVar[tuple[Path, Path] | None] = None

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Remember that a table is due."""
        SweepTable._pending = (self._notes(config), Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Leave a note of a sweep's job: what it is called, where it is, and what went wrong."""
        number = config.hydra.job.get("num")  # a single run has none
        if number is None:
            return
        error = str(job_return._return_value).partition("\n")[0] if job_return.status is JobStatus.FAILED else None
        job = SweepJob(config.hydra.job.override_dirname, Path(config.hydra.runtime.output_dir), error)
        notes = self._notes(config)
        notes.mkdir(parents=True, exist_ok=True)
        write_json(notes / f"{number:06d}.json", {**job._asdict(), "folder": str(job.folder)})

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the table."""
        self.show_pending()

    @classmethod
    def show_pending(cls) -> None:
        """Print the table of the sweep that this process ran, unless that was done."""
        if SweepTable._pending is None:
            return
        (notes, folder), SweepTable._pending = SweepTable._pending, None
        read = [json.loads(note.read_text()) for note in sorted(notes.glob("*.json"))]
        shutil.rmtree(notes, ignore_errors=True)
        console = Console()
        if not console.is_terminal:  # a log file wraps nothing
            console = Console(width=160)
        console.print(sweep_table([SweepJob(job["name"], Path(job["folder"]), job["error"]) for job in read]))
        console.print(f"Results: {folder.resolve()}", soft_wrap=True, highlight=False)

    def _notes(self, config: DictConfig) -> Path:
        return Path(config.hydra.sweep.dir) / f".sweep-{self.sweep}"


def sweep_table(jobs: Sequence[SweepJob]) -> Table:
    """The jobs of a sweep side by side, each as what it was when dense → what it is now.

    Args:
        jobs: in the order of the rows; what their names have in common is left out.

    Returns:
        A rich table; its caption says what went wrong where something did.
    """
    table = Table(title="dense → now", title_justify="left")
    table.add_column("job", overflow="fold")
    for column in ("test/acc", "parameters", "MACs", "bytes", "ms, batch 1", "ms, batch 32"):
        table.add_column(column, justify="right", no_wrap=True)
    common = set.intersection(*(set(job.name.split(",")) for job in jobs)) if len(jobs) > 1 else set()
    failures = []
    for job in jobs:
        name = ", ".join(part for part in job.name.split(",") if part not in common) or job.name or "default"
        if job.error is None:
            table.add_row(name, *_cells(read_results(job.folder)))
        else:
            table.add_row(name, "[red]failed[/]")
            failures.append(f"{name}: {job.error}")
    if failures:
        table.caption, table.caption_justify = escape("\n".join(failures)), "left"
    return table


def _cells(results: Mapping[str, Any]) -> list[str]:
    from lightning_compress.results import Results  # brings torch, which a help text does not need

    metrics = results["metrics"]
    figures = Results.from_json(results).figures()
    accuracies = (metrics[side].get("test/acc") for side in ("dense", "final"))
    cells = [" → ".join(f"{value:.4f}" for value in accuracies if value is not None)]
    for name in ("params", "macs", "bytes", "latency_b1", "latency_b32"):
        both = (figures.get(f"{side}/{name}") for side in ("dense", "compressed"))  # one of them, if nothing was cut
        cells.append(" → ".join(_short(value) for value in both if value is not None))
    return cells


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
