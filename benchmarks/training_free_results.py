"""The tables of the training-free benchmark."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.distillation_results import difference
from benchmarks.distillation_runs import DATA
from benchmarks.results import Results, Rows, mean_of
from benchmarks.training_free_cost import print_costs
from benchmarks.training_free_nets import CALIBRATION, NETS, marked_table
from benchmarks.training_free_runs import DENSE, RECOVERY_BATCH, RECOVERY_STEPS
from benchmarks.training_free_runtime import print_latency
from benchmarks.training_free_sides import OPERATORS, VARIANTS

__all__ = ["print_tables"]


def print_tables(results: Results, console: Console) -> None:
    """Everything that is in the file, in Markdown."""
    cells = [f"{data}, {net}" for data in DATA for net in NETS]
    for cell in cells:
        _untrained(results.rows, cell, console)
    _recovered(results.rows, cells, console)
    for cell in cells:
        print_latency(results.rows, cell, _title(cell), console)
    print_costs(results.rows, console)


def _title(cell: str) -> str:
    data, net = cell.split(", ")
    return f"{NETS[net].title}, {DATA[data]}"


def _untrained(rows: Rows, cell: str, console: Console) -> None:
    dense = rows.get(f"{DENSE}; {cell}", {}).get(DENSE)
    start = f"accuracy without training; {cell}; "
    cases = sorted(case for case in rows if case.startswith(start))
    if dense is None or not cases:
        return
    shown = [v for v in VARIANTS if any(side.endswith(f"; {v}") for case in cases for side in rows[case])]
    table = marked_table("operator", "budget", "MACs", "params", *shown, "CPU s", left=2)
    refused = []
    for operator in OPERATORS:
        name = operator if OPERATORS[operator].peer else f"ours {operator}"
        for case in reversed(cases):
            by_variant = {v: rows[case][f"{name}; {v}"] for v in shown if f"{name}; {v}" in rows[case]}
            found = {v: metrics for v, metrics in by_variant.items() if "refused" not in metrics}
            if by_variant and not found:
                reason = next(iter(by_variant.values()))["refused"]
                refused.append(f"- {name}, {case.removeprefix(start)}: {reason}")
            if by_variant:
                scores = [f"{100 * found[v]['accuracy']:.2f}" if v in found else _missing(by_variant, v) for v in shown]
                spread = [
                    _range([metrics[f"{unit}_fraction"] for metrics in found.values()]) for unit in ("macs", "params")
                ]
                first = next(iter(found.values()), {"compress_cpu_seconds": None})["compress_cpu_seconds"]
                seconds = "" if first is None else f"{first:.1f}"
                table.add_row(name, case.removeprefix(start), *spread, *scores, seconds)
    console.print(
        f"**{_title(cell)}, without training.** Dense: {dense['accuracy']:.2%}, {dense['macs'] / 1e6:.1f} M "
        f"multiply-accumulates, {dense['params'] / 1e3:.0f} k parameters."
    )
    console.print(table)
    for line in refused:
        console.print(line)
    meanings = "; ".join(f"{variant}: {VARIANTS[variant]}" for variant in shown)
    console.print(
        f"Top-1 on the whole test set, in %; {CALIBRATION} unlabelled training images. {meanings}. MACs, params: "
        "fractions of the dense network's; a range where the variants differ. CPU s: of compressing, first variant.\n"
    )


def _missing(by_variant: dict[str, Any], variant: str) -> str:
    return "refused" if variant in by_variant else ""


def _range(values: list[float]) -> str:
    texts = sorted({f"{value:.3f}" for value in values})
    return texts[0] if len(texts) == 1 else f"{texts[0]}–{texts[-1]}" if texts else "–"


def _recovered(rows: Rows, cells: list[str], console: Console) -> None:
    start = f"accuracy after {RECOVERY_STEPS} steps; "
    cases = [case for cell in cells for case in rows if case.startswith(f"{start}{cell}; ")]
    if not cases:
        return
    table = marked_table("network", "operator", "init", "MACs", "seeds", "before", "after", "− data", left=3)
    for case in cases:
        cell, operator, budget = case.removeprefix(start).split("; ")
        for side, metrics in rows[case].items():
            name, variant = side.rsplit("; ", 1)
            if "refused" in metrics:
                table.add_row(_title(cell), f"{name}, {budget}", variant, "refused", "", "", metrics["refused"], "")
                continue
            own = dict(zip(metrics["seed"], metrics["accuracy"], strict=True))
            data = rows[case].get(f"ours {operator}; data", {})
            base = dict(zip(data.get("seed", ()), data.get("accuracy", ()), strict=True))
            before, after = (mean_of(metrics[key]) for key in ("accuracy_before", "accuracy"))
            more = "" if variant == "data" else difference(own, base)
            macs = _range(metrics["macs_fraction"])
            table.add_row(_title(cell), f"{name}, {budget}", variant, macs, str(len(own)), before, after, more)
    console.print(
        f"**After {RECOVERY_STEPS} steps** of batch {RECOVERY_BATCH}, distilled from the dense network; the same "
        "optimizer and learning rate for all."
    )
    console.print(table)
    console.print(
        "Top-1 on the whole test set before and after, mean ± standard deviation over the seeds, in %; differences "
        "seed by seed, ± their standard error; (noise): below two of them.\n"
    )
