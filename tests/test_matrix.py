"""Every scheme of compression works on every type of network: the matrix is run, short, and has no empty cell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.matrix import NETWORKS, SCHEMES

ROOT = Path(__file__).parents[1]
SMALLER = {"channel pruning": "macs", "low rank": "macs", "distillation": "macs", "compact filters": "params"}

Row = tuple[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module", params=NETWORKS)
def row(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, dict[str, float]]]:
    """A network's cells, as the command writes them."""
    folder = tmp_path_factory.mktemp("matrix")
    command = [sys.executable, "benchmarks/matrix.py", "--quick", "--only", request.param, "--work", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((folder / "digits-quick.json").read_text())["rows"]
    assert all(scheme in done.stdout for scheme in SCHEMES)
    return request.param, {cell["side"]: cell["metrics"] for cell in rows}


def test_every_cell_is_filled(row: Row) -> None:
    name, cells = row
    assert set(cells) == {"dense", *SCHEMES}
    assert not [scheme for scheme, metrics in cells.items() if "refused" in metrics]
    dense = cells["dense"]
    assert dense["accuracy"] > (0.9 if name == "feed-forward" else 0.5)
    for scheme, metrics in cells.items():
        assert metrics["accuracy"] > dense["accuracy"] - 0.25, scheme
        assert ("psnr" in metrics) == (name != "feed-forward")
        if scheme != "dense":
            assert metrics["bytes"] < 0.75 * dense["bytes"], scheme
    for scheme, unit in SMALLER.items():
        assert cells[scheme][unit] <= 0.7 * dense[unit], scheme
