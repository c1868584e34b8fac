"""The results of a run as tables for a terminal. What became worse is printed as worse."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.results import LayerRow, Quantity, Results

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table", "layer_table"]


def comparison_table(results: Results) -> Table:
    """Dense and compressed side by side.

    Args:
        results: what was measured.

    Returns:
        A rich table; its caption says how the figures were got.
    """
    from rich.table import Table

    title = "Dense and compressed" if results.compressed is not None else "Nothing was compressed"
    table = Table(title=title, caption=_caption(results), caption_justify="left")
    table.add_column("", overflow="fold")
    for column in ("dense", "compressed", "compressed / dense"):
        table.add_column(column, justify="right")
    for quantity in results.quantities():
        table.add_row(
            quantity.label,
            _show(quantity.kind, quantity.dense, quantity.dense_range),
            _show(quantity.kind, quantity.compressed, quantity.compressed_range),
            _verdict(quantity),
        )
    for budget in results.budgets:
        reached = "not measured" if budget.reached is None else _share(budget.reached)
        table.add_row(f"budget of {budget.unit} ({budget.callback})", f"asked {_share(budget.requested)}", reached, "")
    return table


def layer_table(results: Results) -> Table:
    """What was cut, layer by layer, and what was never cut and why; `results.layers` has every tensor.

    Args:
        results: what was measured.

    Returns:
        A rich table.
    """
    from rich.table import Table

    table = Table(title="What was cut, and what was not")
    for column in ("tensor", "before", "after", "MACs of its layer"):
        table.add_column(column, overflow="fold")
    layers: dict[str, LayerRow] = {}
    for row in results.layers:  # one line for a layer: its largest tensor
        layer = row.tensor.rpartition(".")[0]
        if layer not in layers or _elements(row) > _elements(layers[layer]):
            layers[layer] = row
    working = [row for row in layers.values() if row.macs_before]  # norms follow the layer before them
    for row in working or layers.values():
        macs = f"{_count(row.macs_before)} → {_count(row.macs_after)}"
        table.add_row(row.tensor, _shape(row.before), _shape(row.after), macs)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for location, reason in results.frozen.items():
        reasons[reason].append(location)
    for reason, locations in reasons.items():
        more = f" and {len(locations) - 3} more" if len(locations) > 3 else ""
        table.add_row(", ".join(locations[:3]) + more, "", "not cut", reason)
    return table


def _caption(results: Results) -> str:
    lines = []
    if results.metric is not None and results.metric.note:
        lines.append(f"{results.metric.name}: {results.metric.note}.")
    times = next(iter(results.dense.latency.values()), None)
    if times is not None:
        load = "" if times.load is None else f", load average {times.load:.1f}"
        lines.append(
            f"Times: median \\[lowest – highest] of {times.repeats}, taken in turn; {times.runtime} torch, "
            f"{times.device}{load}."
        )
    lines.append("Peak memory: parameters, buffers, inputs and activations that are alive at once.")
    small = results.deployed.get("compressed")
    if small is not None:
        islands = ", ".join(f"{count} {name}" for name, count in small.islands.items())
        on = f"int8 {small.integer_layers} of {small.layers}"
        if small.integer_layers:
            lines.append("In eager torch a quantized network rounds floats; it is the runtime's times that count.")
        lines.append(f"In ONNX Runtime: {on}" + (f"; on floats: {islands}." if islands else ", nothing on floats."))
    if results.dense.uncounted:
        names = ", ".join(name.removeprefix("aten.") for name in results.dense.uncounted)
        lines.append(f"MACs: of the operations that ran, without {names}.")
    return "\n".join(lines)


def _verdict(quantity: Quantity) -> str:
    dense, compressed = quantity.dense, quantity.compressed
    if dense is None or compressed is None:
        return ""
    if quantity.kind in ("metric", "fraction"):
        return f"{compressed - dense:+.4f}"
    if not dense or not compressed or quantity.kind == "plain":
        return ""
    ratio = compressed / dense
    less, more = ("faster", "slower") if quantity.kind == "ms" else ("less", "more")
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return f"{ratio:.3f}  same"
    return (
        f"{ratio:.3f}  [green]{1 / ratio:.2f}× {less}[/]" if ratio < 1 else f"{ratio:.3f}  [red]{ratio:.2f}× {more}[/]"
    )


def _show(kind: str, value: float | None, spread: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    if kind == "ms":
        low, high = spread or (value, value)
        return f"{value:.3g} ms \\[{low:.3g} – {high:.3g}]"
    if kind == "bytes":
        return f"{value / 1e6:,.3f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
    return _count(value) if kind in ("count", "plain") else f"{value:.4f}"


def _share(value: float) -> str:
    return f"{value:.1%} of dense" if value <= 1 else f"{value:,.0f}"


def _count(value: float) -> str:
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.2f}{suffix}"
    return f"{value:.0f}"


def _elements(row: LayerRow) -> int:
    return math.prod(row.before or row.after or ())


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else " × ".join(map(str, shape)) or "scalar"
