"""How many architectures can be pruned, and is what comes out right? Side by side with Torch-Pruning.

    python benchmarks/coverage.py [--families timm mixed] [--ratio 0.5] [--quick] [--json FILE]

The awkward networks of the tests are always among them. Both sides halve every layer of every network and are
judged by the same independent oracle (`benchmarks/oracle.py`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import signal
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.architectures import by_kind
from benchmarks.command import command
from benchmarks.oracle import Kept, judge
from benchmarks.sides import SIDES, macs_and_params
from tests.networks import AWKWARD, randomize

GOAL = 0.35  # of the MACs, at half of the channels


@dataclass(frozen=True)
class Case:
    """One network to prune.

    Attributes:
        name: of the network.
        kind: `timm`, `mixed` or `awkward`.
        model: the dense network.
        inputs: what both sides plan and the oracle proves on.
        counted: what MACs are counted on.
        heads: names of the layers that give the outputs.
    """

    name: str
    kind: str
    model: nn.Module
    inputs: tuple[Any, ...]
    counted: tuple[Any, ...]
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What one side made of one case.

    Attributes:
        verdict: of the oracle, or `raised`, or `timeout`.
        reason: why, where it is not `exact`.
        macs: what is left of the multiply-accumulates; also where nothing was cut or the result is wrong.
        params: what is left of the parameters.
        whole: layers but the heads that kept all their output channels, of `layers`.
        seconds: from the dense network to the pruned one.
        cpu_seconds: the same in processor time, which other work on the machine disturbs less.
        plan_seconds: `seconds` without the tool's own proof of its result; only our side has one.
        plan_cpu_seconds: the same in processor time.
        error: of the proof, relative.
        effect: how far the outputs moved by the cut, relative; an effect near the error would prove nothing.
    """

    verdict: str
    reason: str = ""
    macs: float = math.nan
    params: float = math.nan
    whole: int = 0
    layers: int = 0
    seconds: float = math.nan
    cpu_seconds: float = math.nan
    plan_seconds: float = math.nan
    plan_cpu_seconds: float = math.nan
    error: float = math.nan
    effect: float = math.nan


def cases(kinds: Sequence[str], quick: bool, only: Sequence[str], size: int | None) -> Iterator[Case]:
    """Build the networks one after the other, since together they would not fit into memory."""
    for kind in kinds:
        if kind == "awkward":
            for name, network in AWKWARD.items():
                if not only or name in only:
                    torch.manual_seed(0)
                    inputs = network.example()
                    yield Case(name, kind, randomize(network()).eval(), inputs, inputs, network.heads)
            continue
        for architecture in by_kind({"timm": "cnn"}.get(kind, kind)):
            if architecture.case in only or (not only and (architecture.quick or not quick)):
                torch.manual_seed(0)
                model = randomize(architecture.build())
                names = {module: name for name, module in model.named_modules()}
                heads = tuple(names[head] for head in architecture.heads(model))
                inputs = architecture.example(size=size)
                yield Case(architecture.case, kind, model, inputs, architecture.counted(model), heads)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the code inside once it has used so much processor time."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(side: str, case: Case, ratio: float, limit: float) -> Row:
    """Let one side prune a copy of the network within `limit` seconds of processor time, and judge it."""
    model = copy.deepcopy(case.model)
    heads = [model.get_submodule(head) for head in case.heads]
    gc.collect()
    try:
        with limited(limit):
            result = SIDES[side](model, case.inputs, ratio, heads)
    except TimeoutError:
        return Row("timeout", f"not done after {limit:.0f} s of processor time")
    except Exception as error:  # noqa: BLE001  one network that cannot be pruned is a row, not the end
        return Row("raised", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    verdict = judge(case.model, result.model, result.kept, case.inputs)
    whole, layers = left_whole(case, result.kept)
    shares = (math.nan, math.nan)
    if verdict.kind != "raised":
        before = macs_and_params(case.model, case.counted)
        try:
            after = macs_and_params(result.model, case.counted)
        except Exception as error:  # noqa: BLE001  right at one resolution, broken at another
            return Row("raised", f"at the native size: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        shares = (after[0] / before[0] if before[0] else 1.0, after[1] / before[1])
    all_, own = result.clock, result.proof
    times = (all_.wall, all_.cpu, all_.wall - own.wall, all_.cpu - own.cpu)
    return Row(verdict.kind, verdict.reason, *shares, whole, layers, *times, verdict.error, verdict.effect)


def left_whole(case: Case, kept: Kept) -> tuple[int, int]:
    """How many layers but the heads kept all their outputs, and how many there are; raw parameters count as layers."""
    whole = layers = 0
    for name, parameter in case.model.named_parameters():
        owner, _, _ = name.rpartition(".")
        if parameter.dim() < 2 or any(owner == head or owner.startswith(f"{head}.") for head in case.heads):
            continue
        transposed = getattr(case.model.get_submodule(owner), "transposed", False)
        dim = 1 if transposed else 0
        index = kept.get(name, {}).get(dim)
        layers += 1
        whole += index is None or len(index) == parameter.shape[dim]
    return whole, layers


def print_table(rows: dict[str, dict[str, Row]], kinds: dict[str, str], console: Console) -> None:
    """All rows, one line per case."""
    sides = list(next(iter(rows.values())))
    table = Table("case", title="Half of the channels of every layer")
    for side in sides:
        for column in (side, "whole", "MACs", "params", "plan s", "s"):
            table.add_column(column, justify="left" if column == side else "right")
    last = ""
    for case, found in rows.items():
        if kinds[case] != last:
            table.add_section()
            last = kinds[case]
        cells = [case]
        for row in found.values():
            style = {
                "exact": "green",
                "restricted": "green",
                "WRONG": "bold red",
                "raised": "red",
                "timeout": "red",
            }.get(row.verdict, "yellow")
            figures = (f"{row.macs:.2f}", f"{row.params:.2f}", f"{row.plan_seconds:.2f}", f"{row.seconds:.2f}")
            cells += [
                f"[{style}]{row.verdict}[/]",
                f"{row.whole}/{row.layers}",
                *(f.replace("nan", "–") for f in figures),
            ]
        table.add_row(*cells)
    console.print(table)
    for case, found in rows.items():
        for side, row in found.items():
            if row.verdict in ("WRONG", "raised", "timeout", "unprovable"):
                console.print(f"{case}, {side}: {row.verdict}: {row.reason}", markup=False, highlight=False)


def summarize(rows: dict[str, dict[str, Row]]) -> dict[str, dict[str, Any]]:
    """For each side: how often each verdict, how many within the goal, and the time beside the other side's."""
    summary: dict[str, dict[str, Any]] = {}
    for side in next(iter(rows.values())):
        own = [found[side] for found in rows.values()]
        right = [row for row in own if row.verdict in ("exact", "restricted")]
        seconds = [row.seconds for row in own if not math.isnan(row.seconds)]
        summary[side] = {
            "cases": len(own),
            **Counter(row.verdict for row in own),
            "partly frozen": sum(row.whole > 0 for row in right),
            f"right with MACs <= {GOAL}": sum(row.macs <= GOAL for row in right),
            "median seconds": statistics.median(seconds) if seconds else math.nan,
            "median CPU seconds": statistics.median(r.cpu_seconds for r in own if r.seconds > 0)
            if seconds
            else math.nan,
        }
    if set(summary) == set(SIDES):
        for unit in ("seconds", "cpu_seconds", "plan_seconds", "plan_cpu_seconds"):
            pairs = [(getattr(a, unit), getattr(b, unit)) for a, b in (found.values() for found in rows.values())]
            ratios = [a / b for a, b in pairs if not math.isnan(a + b)]
            summary["ours"][f"median ratio of {unit}"] = statistics.median(ratios) if ratios else math.nan
    return summary


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("timm", "mixed")
    parser.add_argument(
        "--families",
        nargs="*",
        choices=kinds,
        default=kinds,
        help="timm: CNNs of timm and torchvision; mixed: with attention",
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="of the channels of every layer that go")
    parser.add_argument("--side", choices=("both", *SIDES), default="both")
    parser.add_argument("--quick", action="store_true", help="15 architectures, and the awkward networks")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these cases")
    parser.add_argument("--size", type=int, help="pixels of the input, where the architecture takes fewer")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with one, times repeat best")
    parser.add_argument("--limit", type=float, default=60, help="seconds of processor time for a network and side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    console = Console(width=None if sys.stdout.isatty() else 150)
    sides = list(SIDES) if options.side == "both" else [options.side]
    families = [*(kind for kind in options.families if not (options.quick and kind == "mixed")), "awkward"]

    warm = next(cases(["awkward"], False, ["SqueezeExcite"], None))
    for side in sides:  # what is imported and compiled at the first use belongs to no network
        run(side, warm, options.ratio, options.limit)

    rows: dict[str, dict[str, Row]] = {}
    kind_of: dict[str, str] = {}
    for number, case in enumerate(cases(families, options.quick, options.only, options.size)):
        # In turn, so that what a busy machine does to one side it does to the other; which is first alternates.
        order = sides if number % 2 == 0 else sides[::-1]
        found = {side: run(side, case, options.ratio, options.limit) for side in order}
        rows[case.name] = {side: found[side] for side in sides}
        kind_of[case.name] = case.kind
        state = ", ".join(f"{s} {r.verdict} {r.macs:.2f} {r.seconds:.1f}s" for s, r in rows[case.name].items())
        console.print(f"[{number + 1}] {case.name}: {state}", markup=False, highlight=False)
    if not rows:
        parser.error(f"no case is named {', '.join(options.only)}")
    print_table(rows, kind_of, console)
    summaries = {}
    for kind in dict.fromkeys(kind_of.values()):
        summaries[kind] = summarize({name: found for name, found in rows.items() if kind_of[name] == kind})
        for side, figures in summaries[kind].items():
            text = ", ".join(
                f"{name}: {v:.3g}" if isinstance(v, float) else f"{name}: {v}" for name, v in figures.items()
            )
            console.print(f"{kind}, {side}: {text}", highlight=False)
    if options.json:
        write_json(options.json, rows, kind_of, summaries)


def write_json(
    path: Path, rows: dict[str, dict[str, Row]], kinds: dict[str, str], summaries: dict[str, dict[str, dict[str, Any]]]
) -> None:
    """Every number of the tables; what could not be measured is null."""

    def plain(metrics: dict[str, Any]) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}

    data = {
        "benchmark": "coverage",
        "command": command(),
        "rows": [
            {"case": case, "kind": kinds[case], "side": side, "metrics": plain(asdict(row))}
            for case, found in rows.items()
            for side, row in found.items()
        ],
        "summary": {kind: {side: plain(v) for side, v in sides.items()} for kind, sides in summaries.items()},
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
