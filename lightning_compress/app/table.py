"""The table of a sweep's jobs, failed ones included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from lightning_compress.app.jobs import JOB, RESULTS, read_json

__all__ = ["SweepJob", "sweep_rows", "sweep_table"]


class SweepJob(NamedTuple):
    """One job of a sweep, as its table needs it.

    Attributes:
        name: its overrides.
        folder: where it wrote.
        error: the first line of what went wrong; None if nothing did.
        left_out: it was never run, since it makes no sense.
    """

    name: str
    folder: Path
    error: str | None
    left_out: bool = False


def sweep_table(jobs: Sequence[SweepJob]) -> Table:
    """The jobs of a sweep side by side, each as what it was when dense → what it is now.

    Args:
        jobs: in the order of the rows; what their names have in common is left out.

    Returns:
        A rich table; its caption says what went wrong where something did.
    """
    table = Table(title="dense → now", title_justify="left")
    table.add_column("job", overflow="fold", min_width=20)
    for column in ("test/acc", "parameters", "MACs", "bytes", "ms, batch 1", "ms, batch 32"):
        table.add_column(column, justify="right", no_wrap=True)
    names = [set(job.name.split(",")) for job in jobs if not job.left_out]
    common = set.intersection(*names) if len(names) > 1 else set()
    failures = []
    for job in jobs:
        name = ", ".join(part for part in job.name.split(",") if part not in common) or job.name or "default"
        if job.error is None:
            table.add_row(name, *_cells(read_json(job.folder / RESULTS)))
        else:
            table.add_row(name, "left out" if job.left_out else "[red]failed[/]")
            failures.append(f"{name}: {job.error}")
    if failures:
        table.caption, table.caption_justify = escape("\n".join(failures)), "left"
    return table


def sweep_rows(jobs: Sequence[SweepJob]) -> list[dict[str, Any]]:
    """The same jobs as plain data, for other tables than ours.

    Args:
        jobs: of a sweep.

    Returns:
        For each: `job`, `arch`, `method`, `accuracy` (on the test set), `macs`, `params`, `bytes` and `error`; None
        where a job came to nothing.
    """
    rows = []
    for job in jobs:
        about = (read_json(job.folder / JOB).get("job") or {}).get("choices", {})
        results = {} if job.error else read_json(job.folder / RESULTS)
        figures, final = results.get("figures", {}), results.get("metrics", {}).get("final", {})
        costs = {
            name: figures.get(f"compressed/{name}", figures.get(f"dense/{name}"))
            for name in ("macs", "params", "bytes")
        }
        named = {"job": job.name, "arch": about.get("arch"), "method": about.get("method")}
        rows.append({**named, "accuracy": final.get("test/acc"), **costs, "error": job.error})
    return rows


def _cells(results: Mapping[str, Any]) -> list[str]:
    if "metrics" not in results:  # a job of another kind
        return []
    metrics, figures = results["metrics"], results["figures"]
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
