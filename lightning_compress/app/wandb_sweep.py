"""What W&B is told at the end of a sweep: all jobs in one table, and accuracy against cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_compress.app.account import offline_mode

__all__ = ["log_sweep"]

Row = Mapping[str, str | float | None]


def log_sweep(
    group: str,
    rows: Sequence[Row],
    project: str,
    *,
    save_dir: str | os.PathLike[str],
    entity: str | None = None,
    y: str = "accuracy",
    costs: Sequence[str] = ("macs", "bytes"),
    offline: bool | None = None,
) -> None:
    """Add a run to a sweep's group that shows its jobs side by side.

    The run is called as the group is and has the job type `sweep`. It holds a table of the jobs under `sweep/jobs`, and
    for each cost a scatter plot of `y` against it under `sweep/{y}_{cost}`, of the jobs that have both.

    Args:
        group: the sweep's name, which its jobs have for their group.
        rows: one for each job: column -> value. What a row lacks is left empty.
        project: the project of the jobs.
        save_dir: where W&B writes.
        entity: whose project it is; by default the account's own.
        y: the column of what one wants much of.
        costs: the columns of what one wants little of.
        offline: see `wandb_logger`.

    Raises:
        ValueError: there are rows, and none has `y`.
    """
    import wandb

    columns = list(dict.fromkeys(column for row in rows for column in row))
    if rows and y not in columns:
        raise ValueError(f"`y` must be a column of the rows ({', '.join(columns)}), got {y!r}")
    mode = "offline" if offline_mode(offline) else None
    told = {"group": group, "job_type": "sweep", "jobs": len(rows)}
    with wandb.init(
        project=project,
        entity=entity,
        dir=os.fspath(save_dir),
        group=group,
        name=group,
        job_type="sweep",
        config=told,
        mode=mode,  # type: ignore[arg-type]  # mypy sees no literal in a conditional expression
    ) as run:
        logged: dict[str, Any] = {"sweep/jobs": _table(columns, rows)}
        for cost in costs:
            both = [row for row in rows if row.get(cost) is not None and row.get(y) is not None]
            if both:
                title = f"{y} against {cost}"
                logged[f"sweep/{y}_{cost}"] = wandb.plot.scatter(_table(columns, both), cost, y, title)
        run.log(logged)


def _table(columns: Sequence[str], rows: Sequence[Row]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[[row.get(column) for column in columns] for row in rows])
