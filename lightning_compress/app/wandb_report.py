"""`lightning-compress-wandb-report`: a W&B report of a project's jobs, or of one sweep."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lightning_compress.app.account import offline_mode
from lightning_compress.extras import require_extra

__all__ = ["build_report", "main"]

_EXAMPLES = """examples:
  lightning-compress-wandb-report --project lightning-compress              of all jobs
  lightning-compress-wandb-report --project mine --group my-sweep           of one sweep
  lightning-compress-wandb-report --project mine --metric final/test/loss
  lightning-compress-wandb-report --project mine --dry-run                  prints it, without a login

Jobs are logged with lightning-compress logger=wandb logger.wandb.project=mine."""

_COSTS = ("macs", "bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script.

    Args:
        arguments: by default those of the command line.

    Returns:
        What the process exits with.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-compress-wandb-report",
        description="Make a W&B report of jobs: accuracy against MACs and bytes, side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--project", required=True, help="the project that the jobs were logged to")
    parser.add_argument("--entity", default="", help="whose project it is; by default your own")
    parser.add_argument("--group", help="only the jobs of this sweep; by default all")
    parser.add_argument("--metric", default="final/test/acc", help="what one wants much of (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the report as JSON; needs no login")
    given = parser.parse_args(arguments)
    try:  # what is missing is said before anything else
        require_extra("wandb_workspaces", "wandb")
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error}\n")
    if given.dry_run:
        model = build_report(given.project, "", given.group, given.metric)._to_model()
        _say(json.dumps(json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)), indent=2))
        return 0
    if offline_mode():
        parser.exit(
            1,
            "a report is saved on W&B's server, which needs a login: run `wandb login` or set WANDB_API_KEY, with "
            "WANDB_MODE not offline; --dry-run prints the report without one\n",
        )
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        entity = (
            given.entity or wandb.Api(timeout=30).default_entity or parser.error("--entity is needed: W&B knows none")
        )
        report = build_report(given.project, entity, given.group, given.metric).save()
    except (wandb.Error, WandbApiFailedError) as error:
        parser.exit(1, f"W&B did not take the report: {error}\n")
    _say(report.url)
    return 0


def build_report(project: str, entity: str, group: str | None = None, metric: str = "final/test/acc") -> Any:
    """The report, not saved yet.

    Args:
        project: that the jobs were logged to.
        entity: whose project it is; empty for a report that is only looked at, for else W&B is asked for its project.
        group: only the jobs of this sweep; None for all.
        metric: what one wants much of, as W&B's summaries have it.

    Returns:
        A `wandb_workspaces.reports.v2.Report`.

    Raises:
        ModuleNotFoundError: the extra `wandb` is not installed.

    Example:
        >>> build_report("lightning-compress", entity="").title  # needs no login, unless it is saved
        'Compression: project lightning-compress'
    """
    expr = require_extra("wandb_workspaces.expr", "wandb")
    wr = require_extra("wandb_workspaces.reports.v2", "wandb")
    rules = [expr.Metric("JobType") != "sweep"]  # the run that shows a sweep's jobs is none of them
    if group is not None:
        rules.append(expr.Metric("Group") == group)
    runs = wr.Runset(entity=entity, project=project, name=group or "all jobs", filters=expr.And(*rules))
    value = wr.SummaryMetric(metric)
    column = wr.ParallelCoordinatesPlotColumn
    scatters = [
        wr.ScatterPlot(
            title=f"{metric} against {cost}",
            x=wr.SummaryMetric(f"compress/{cost}"),
            y=value,
            log_x=True,
            layout=wr.Layout(x=12 * place, y=0, w=12, h=10),
        )
        for place, cost in enumerate(_COSTS)
    ]
    parallel = wr.ParallelCoordinatesPlot(
        title="From method to accuracy",
        columns=[
            column(wr.Config("choices.arch"), display_name="arch"),
            column(wr.Config("job_type"), display_name="method"),
            *(column(wr.SummaryMetric(f"compress/{cost}"), display_name=cost, log=True) for cost in _COSTS),
            column(value, display_name=metric),
        ],
        layout=wr.Layout(x=0, y=10, w=24, h=10),
    )
    bars = wr.BarPlot(title=metric, metrics=[value], layout=wr.Layout(x=0, y=20, w=12, h=10))
    curves = wr.LinePlot(
        title="MACs over epochs", x="epoch", y=["compress/macs"], layout=wr.Layout(x=12, y=20, w=12, h=10)
    )
    of = f"sweep {group}" if group else f"project {project}"
    return wr.Report(
        project=project,
        entity=entity,
        title=f"Compression: {of}"[:128],
        description="Accuracy against what a network costs. Every job is a point; upper left is better.",
        blocks=[wr.PanelGrid(runsets=[runs], panels=[*scatters, parallel, bars, curves])],
    )


def _say(text: str) -> None:
    print(text)  # noqa: T201  # what the command is for


if __name__ == "__main__":
    raise SystemExit(main())
