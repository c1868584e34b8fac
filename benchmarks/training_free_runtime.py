"""What a compressed network is worth in time: beside the dense one and a thin one of as many multiply-accumulates.

Eager torch and ONNX Runtime, one thread each, the three networks in turns, in alternating order.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.distillation_runs import Place
from benchmarks.results import Found, refusal
from benchmarks.training_free_nets import Cell, build, calibration_images, dense_network, marked_table, widest
from benchmarks.training_free_runs import REFUSALS, Task
from benchmarks.training_free_sides import OPERATORS, compress
from lightning_compress import export, measure
from lightning_compress.calls import as_calls
from lightning_compress.deployment import RuntimeNetwork
from lightning_compress.latency import Latency, compare_latency

__all__ = ["BATCHES", "RUNTIMES", "THIN", "compare", "print_latency", "tasks_to_time", "timed_case"]

RUNTIMES = ("eager", "ONNX Runtime")
BATCHES = (1, 32)
THIN = "thin"
PARITY = 1e-4  # largest difference of an exported network's outputs, relative to their largest
FASTER = 1.05  # below it a network is not called faster: what repeated runs differ by


def exported(net: nn.Module, image: Tensor) -> RuntimeNetwork:
    """A network in ONNX Runtime, which is called as the network is.

    Raises:
        ExportError: it cannot be exported.
        ValueError: its outputs differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        export(net, path, image)
        found = RuntimeNetwork(path)
    for size in BATCHES:
        x = image + torch.randn(size, *image.shape[1:], generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            wanted = net(x)
        difference = float((found(x) - wanted).abs().max() / wanted.abs().max())
        if not difference <= PARITY:
            raise ValueError(f"exported to ONNX, outputs differ by {difference:.1e} of their largest")
    return found


def thin_network(cell: Cell, macs: int, image: Tensor) -> tuple[nn.Module, float]:
    """The widest network of the same architecture with at most so many multiply-accumulates, and its width."""

    def made(width: float) -> nn.Module:
        return build(cell.net, image.shape[1], width).eval()

    width = widest(made, macs, image)
    return made(width), width


def tasks_to_time(cell: Cell, tasks: list[Task]) -> list[Task]:
    """Ours, made from data: low-rank networks at each budget, compact filters where they replace all layers."""
    return [
        task
        for task in tasks
        if task.cell == cell
        and task.side.startswith("ours ")
        and task.variant == "data"
        and (task.budget is None) == (OPERATORS[task.operator].kind == "compact")
    ]


def timed_case(task: Task, runtime: str, batch: int) -> str:
    """Of the JSON file."""
    return f"latency; {task.cell.case}; {task.operator}; {task.where}; {runtime}; batch {batch}"


def compare(task: Task, place: Place, repeats: int, seconds: float) -> list[Found]:
    """Time the dense, the compressed and the thin network against each other.

    Args:
        task: what to compress, and how.
        place: where the data is.
        repeats: how many times each is timed.
        seconds: about how long one batch size of one runtime may take.
    """
    dense = dense_network(task.cell, place).net
    x = calibration_images(task.cell, place)
    image = x[:1].contiguous()
    try:
        net = compress(dense, task.operator, task.variant, task.budget, x).net
    except REFUSALS as error:
        return [
            Found(timed_case(task, runtime, batch), task.side, refusal(error))
            for runtime in RUNTIMES
            for batch in BATCHES
        ]
    macs = measure(net, image).macs
    thin, width = thin_network(task.cell, macs, image)
    nets = {"dense": dense, task.side: net, THIN: thin}
    own = {name: {"macs": measure(side, image).macs} for name, side in nets.items()}
    own[THIN]["width"] = width
    found = []
    for runtime in RUNTIMES:
        try:
            sides = nets if runtime == "eager" else {n: exported(side.eval(), image) for n, side in nets.items()}
        except (ValueError, RuntimeError) as error:
            found += [Found(timed_case(task, runtime, batch), task.side, refusal(error)) for batch in BATCHES]
            continue
        calls = {name: (side, as_calls(image)) for name, side in sides.items()}
        times = compare_latency(calls, BATCHES, repeats=repeats, seconds=seconds)
        for name, by_batch in times.items():
            for batch, latency in by_batch.items():
                found.append(Found(timed_case(task, runtime, batch), name, {**own[name], **_metrics(latency)}))
    return found


def _metrics(latency: Latency) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for clock, spread in (("wall_ms", latency.wall), ("cpu_ms", latency.cpu)):
        values |= {clock: spread.median, f"{clock}_low": spread.low, f"{clock}_high": spread.high}
    return {**values, "repeats": latency.repeats, "threads": latency.threads, "load": latency.load}


def print_latency(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], cell: str, title: str, console: Console) -> None:
    """The table of one network: how many times faster than the dense one, by processor time."""
    start = f"latency; {cell}; "
    ways = [(runtime, batch) for runtime in RUNTIMES for batch in BATCHES]
    names = list(dict.fromkeys(case.removeprefix(start).rsplit("; ", 2)[0] for case in rows if case.startswith(start)))
    if not names:
        return
    titles = [f"{runtime}, {batch}" for runtime, batch in ways]
    table = marked_table("operator", "MACs", *titles, "in reality", left=1)
    dense_ms: dict[str, list[float]] = {way: [] for way in titles}
    refused: list[str] = []
    for name in names:
        cells, gains, thin_gains, macs = [], {}, {}, ""
        for way, (runtime, batch) in zip(titles, ways, strict=True):
            sides = rows.get(f"{start}{name}; {runtime}; batch {batch}", {})
            ours = next((metrics for side, metrics in sides.items() if side.startswith("ours ")), {})
            if "cpu_ms" not in ours:
                cells.append("refused" if ours else "")
                reason = f"{name}: {ours.get('refused', 'not measured')}"
                refused += [reason] if reason not in refused else []
                continue
            dense, thin = sides["dense"], sides[THIN]
            gains[way], thin_gains[way] = dense["cpu_ms"] / ours["cpu_ms"], dense["cpu_ms"] / thin["cpu_ms"]
            macs = f"{ours['macs'] / dense['macs']:.3f}"
            cells.append(f"{gains[way]:.2f}× ({thin_gains[way]:.2f}×)")
            dense_ms[way].append(dense["wall_ms"])
        table.add_row(name.replace("; ", ", "), macs, *cells, _verdict(gains))
    console.print(
        f"**{title}, latency** by runtime and batch size. How many times faster than the dense network (in brackets: "
        "the thin one)."
    )
    console.print(table)
    for reason in refused:
        console.print(f"- {reason}")
    times = ", ".join(f"{way} {statistics.median(ms):.2f} ms" for way, ms in dense_ms.items() if ms)
    console.print(
        f"Ratios of medians of processor time, one thread, the three in turns. Thin: the same architecture, as wide as "
        f"the compressed network's multiply-accumulates allow, not trained. Faster: {FASTER:g}× or more. The dense "
        f"network takes {times} (wall, median).\n"
    )


def _verdict(gains: Mapping[str, float]) -> str:
    faster = [way for way, gain in gains.items() if gain >= FASTER]
    if not gains:
        return ""
    if not faster:
        return "on paper only"
    return "faster" if len(faster) == len(gains) else f"faster: {'; '.join(faster)}"
