"""What a layer is worth, by itself and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.app.sensitivity import layer_sensitivity
from lightning_compress.coupling import trace_coupling
from lightning_compress.methods.sensitivity import without_worst
from lightning_compress.zoo import Digits, ImageClassifier
from tests.app.test_sweep import run_module


def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=2)


def test_a_layer_that_nothing_depends_on_is_worth_nothing_and_the_network_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)
    )  # fmt: skip
    nn.init.zeros_(net[5].weight[:, :6])  # half of what the second hidden layer finds is of no use
    nn.init.zeros_(net[3].weight[:6])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rows = layer_sensitivity(ImageClassifier(net, 10), Digits(tmp_path), trainer(), shares=[0.5])
    assert [(row["layer"], row["channels"]) for row in rows] == [("1", 16), ("3", 12)]
    assert rows[1]["error"] == [0.0]
    assert rows[1]["metric"] == [0.0]
    assert rows[0]["error"][0] > 0
    assert rows[0]["macs"] == pytest.approx((8 * 64 + 8 * 12) / (64 * 16 + 16 * 12 + 12 * 10))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_worst_channels_are_zero_wherever_they_live() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    [group] = (coupling := trace_coupling(net, torch.randn(2, 3))).groups
    zeroed = without_worst(coupling, group, np.array([3.0, 0.0, 2.0, 1.0]), 0.5)
    assert set(zeroed) == {"0.weight", "0.bias", "2.weight"}
    assert zeroed["0.weight"][[1, 3]].abs().sum() == zeroed["2.weight"][:, [1, 3]].abs().sum() == 0
    assert torch.equal(zeroed["0.weight"][[0, 2]], net[0].weight[[0, 2]])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shares": [1.0]}, r"fractions of a layer's channels in \(0, 1\), got 1\.0"),
        ({"metric": "val/auc"}, "one of val/loss, val/acc, got"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    task = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 10)), 10)
    with pytest.raises(ValueError, match=said):
        layer_sensitivity(task, Digits(tmp_path), trainer(), **changes)  # type: ignore[arg-type]


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    arguments = ["arch=lenet5", "arch.width=0.3", "trainer=debug", "dense.max_epochs=1"]
    done = run_module("lightning_compress.app.sensitivity", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "each layer alone" in done.stdout
    [file] = tmp_path.rglob("sensitivity.json")
    assert [row["layer"] for row in json.loads(file.read_text())["rows"]] == ["conv1", "conv2", "fc1"]
    mistaken = run_module("lightning_compress.app.sensitivity", tmp_path, *arguments, "sensitivity.criterion=taylor")
    assert mistaken.returncode == 1
    assert "Traceback" not in mistaken.stderr
