"""The tables of the quantization benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from benchmarks.quantization_runs import EAGER, LOW_BITS, OURS, PRUNED, RUNTIME, SMALL, case_of
from benchmarks.quantization_runtime import BATCHES, NETS, timed_case
from benchmarks.results import Rows, mean_of
from benchmarks.training_free_nets import NETS as TRAINED
from benchmarks.training_free_nets import marked_table

__all__ = ["print_tables"]

TITLES = {**{name: net.title for name, net in TRAINED.items()}, "resnet18": "ResNet-18, 224 x 224"}
SLOWER = 0.97  # of float's speed in ONNX Runtime, below which a side is called slower


def print_tables(rows: Rows, console: Console) -> None:
    """All of them."""
    for net in NETS:
        _print_net(rows, net, console)
    _print_low_bits(rows, console)


def _print_net(rows: Rows, net: str, console: Console) -> None:
    accuracy = rows.get(case_of(net), {})
    times = {batch: rows.get(timed_case(net, batch), {}) for batch in BATCHES}
    names = list(dict.fromkeys([*accuracy, *times[1]]))
    if not names:
        return
    order = [EAGER, RUNTIME, *OURS, PRUNED]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    table = marked_table(
        *("side", "seeds", "accuracy", "− float", "bytes", "times smaller", "int8 layers", "float operations"),
        *(f"batch {batch}: ms, × float" for batch in BATCHES),
        "in reality",
        left=1,
    )
    float_bytes = _first(accuracy.get(RUNTIME) or times[1].get(RUNTIME) or {}, "bytes")
    float_accuracy = _first(accuracy.get(EAGER, {}), "accuracy")
    refused = []
    for name in names:
        own, timed = accuracy.get(name, {}), [times[batch].get(name, {}) for batch in BATCHES]
        if "refused" in own or any("refused" in one for one in timed):
            refused.append(f"{name}: {own.get('refused') or timed[0]['refused']}")
            continue
        info = own if "accuracy" in own else timed[0]
        size = _first(info, "bytes") if name != EAGER else None
        gains = [_gain(times[batch], name) for batch in BATCHES]
        layers = _first(info, "layers_int8")
        table.add_row(
            name,
            str(len(own["accuracy"])) if own else "",
            mean_of(own["accuracy"]) if own else "",
            f"{100 * (statistics.mean(own['accuracy']) - float_accuracy):+.2f}" if own and float_accuracy else "",
            "" if size is None else f"{size:,.0f}",
            "" if size is None or not float_bytes else f"{float_bytes / size:.2f}",
            "" if layers is None else f"{layers:.0f} of {_first(info, 'layers'):.0f}",
            "" if layers is None else f"{_first(info, 'islands'):.0f}",
            *(f"{one['cpu_ms']:.2f}, {gain:.2f}" if gain else "" for one, gain in zip(timed, gains, strict=True)),
            _verdict(name, gains),
        )
    console.print(f"**{TITLES[net]}**")
    console.print(table)
    for reason in refused:
        console.print(f"- {reason}")
    console.print(
        "Accuracy: top-1 on the 10,000 test images of Fashion-MNIST, in the side's own runtime, mean ± standard "
        "deviation over the seeds, in %. Bytes: of the file that one deploys; times smaller than float's ONNX file. "
        "int8 layers and float operations: in the graph that ONNX Runtime makes of the file. Times: medians of "
        "processor time of one thread, all sides in turns; × float: how many times faster than float in ONNX Runtime.\n"
    )


def _first(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return statistics.mean(value) if isinstance(value, list) else value


def _gain(sides: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    if "cpu_ms" not in sides.get(name, {}) or "cpu_ms" not in sides.get(RUNTIME, {}):
        return None
    return float(sides[RUNTIME]["cpu_ms"] / sides[name]["cpu_ms"])


def _verdict(name: str, gains: list[float | None]) -> str:
    known = [gain for gain in gains if gain is not None]
    if not known or name in (EAGER, RUNTIME):
        return ""
    slow = [gain < SLOWER for gain in known]
    return "slower" if all(slow) else "faster" if not any(slow) else "faster, or slower, by batch"


def _print_low_bits(rows: Rows, console: Console) -> None:
    sides = rows.get(f"low bits; fashion-mnist, {SMALL}", {})
    if not sides:
        return
    table = marked_table(
        *("weights and values", "seeds", "float", "after training", "in training", "− float", "in torch"),
        *("artifact, bytes", "times smaller"),
        left=1,
    )
    for name in LOW_BITS:
        own = sides.get(name)
        if own is None:
            continue
        gap = statistics.mean(a - b for a, b in zip(own["accuracy"], own["float"], strict=True))
        size, before = statistics.mean(own["bytes"]), statistics.mean(own["float_bytes"])
        table.add_row(
            name,
            str(len(own["seed"])),
            *(mean_of(own[key]) for key in ("float", "after_training", "accuracy")),
            f"{100 * gap:+.2f}",
            mean_of(own["in_torch"]),
            f"{size:,.0f}",
            f"{before / size:.2f}",
        )
    console.print("**ResNet-8, 19 thousand weights, few bits**")
    console.print(table)
    console.print(
        "Accuracy in ONNX Runtime, where weights of fewer bits than eight run as int8: no faster, the file alone is "
        "smaller. In torch: of the same network with fake quantization. The first and the last layer have 8 bits.\n"
    )
