"""Results survive the disk, and tables say what is worse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lightning_compress.footprint import Footprint
from lightning_compress.latency import Latency, Spread
from lightning_compress.results import BudgetRow, LayerRow, Metric, Results, ResultsError
from lightning_compress.tables import comparison_table, layer_table


def latency(milliseconds: float, size: int) -> Latency:
    wall = Spread(milliseconds, milliseconds / 2, milliseconds * 2)
    return Latency(wall, Spread(milliseconds, milliseconds, milliseconds), size, 20, 2, 0.5, "cpu")


DENSE = Footprint(
    params=1000,
    nonzero=1000,
    macs=2_000_000,
    bytes=4000,
    peak_memory=9_000_000,
    layers={"conv": 1_500_000, "head": 500_000},
    uncounted={"aten.relu": 64},
    latency={1: latency(2.0, 1), 32: latency(10.0, 32)},
)
SMALL = replace(DENSE, params=250, nonzero=200, macs=500_000, latency={1: latency(3.0, 1), 32: latency(5.0, 32)})
RESULTS = Results(
    dense=DENSE,
    compressed=SMALL,
    metric=Metric("val/acc", 0.95, 0.94, "dense is the network before its first edit"),
    layers=(
        LayerRow("conv.bias", (8,), (4,), 1_500_000, 375_000),
        LayerRow("conv.weight", (8, 3, 3, 3), (4, 3, 3, 3), 1_500_000, 375_000),
        LayerRow("norm.weight", (8,), (4,), 0, 0),
        LayerRow("extra", None, (2,), 0, 0),
    ),
    frozen={f"head.{i}": "reaches the output" for i in range(5)} | {"conv.weight[1]": "reaches the input"},
    budgets=(BudgetRow("ChannelPruning", "macs", 0.25, 0.25), BudgetRow("ChannelPruning", "latency", 1000, None)),
    edits={"ChannelPruning": 2},
    artifact="net.safetensors",
    network="net",
    environment={"torch": "2"},
)


def text(table: Table) -> str:
    console = Console(width=140, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("results", [RESULTS, Results(DENSE)], ids=["compressed", "dense"])
def test_survives_the_disk(tmp_path: Path, results: Results) -> None:
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        (None, "no file"),
        ("{", "not JSON"),
        ("[1]", "expected format 1, got None"),
        ('{"format": 9}', "expected format 1, got 9"),
        ('{"format": 1}', "damaged"),
        (json.dumps({**RESULTS.to_json(), "layers": 3}), "damaged"),
    ],
)
def test_refuses_what_is_something_else(tmp_path: Path, contents: str | None, match: str) -> None:
    if contents is not None:
        (tmp_path / "a").write_text(contents)
    with pytest.raises(ResultsError, match=match):
        Results.load(tmp_path / "a")


def test_figures() -> None:
    figures = RESULTS.figures()
    assert figures["dense/metric"] == 0.95
    assert figures["difference/metric"] == pytest.approx(-0.01)
    assert figures["ratio/macs"] == 0.25
    assert figures["ratio/latency_b1"] == 1.5
    assert figures["compressed/sparsity"] == pytest.approx(0.2)
    assert "ratio/sparsity" not in figures
    assert not any("compressed" in name or "ratio" in name for name in Results(DENSE).figures())


def test_slower_is_printed_as_slower() -> None:
    lines = {line.split("│")[1].strip(): line for line in text(comparison_table(RESULTS)).splitlines() if "│" in line}
    assert "1.50× slower" in lines["latency, batch 1, 2 threads"]
    assert "3 ms [1.5 – 6]" in lines["latency, batch 1, 2 threads"]
    assert "2.00× faster" in lines["latency, batch 32, 2 threads"]
    assert "4.00× less" in lines["MACs per sample"]
    assert "same" in lines["size on disk"]
    assert "-0.0100" in lines["val/acc"]
    larger = text(comparison_table(replace(RESULTS, compressed=replace(SMALL, bytes=8000))))
    assert "2.00× more" in larger


def test_the_table_says_how_figures_were_got() -> None:
    shown = text(comparison_table(RESULTS))
    for part in (
        "median [lowest – highest] of 20",
        "eager",
        "load average 0.5",
        "without relu",
        "before its first edit",
    ):
        assert part in shown
    assert "asked 25.0% of dense" in shown
    assert "not measured" in shown


def test_dense_alone() -> None:
    shown = text(comparison_table(Results(DENSE)))
    assert "Nothing was compressed" in shown
    assert "×" not in shown
    assert "less" not in shown


def test_layers_one_line_each_and_reasons_once() -> None:
    shown = text(layer_table(RESULTS))
    assert "8 × 3 × 3 × 3" in shown
    assert "conv.bias" not in shown
    assert "norm.weight" not in shown
    assert "head.0, head.1, head.2 and 2 more" in shown
    assert shown.count("reaches the output") == 1


def test_layers_without_products_are_shown_where_there_are_no_others() -> None:
    assert "none" in text(layer_table(replace(RESULTS, layers=RESULTS.layers[2:])))
