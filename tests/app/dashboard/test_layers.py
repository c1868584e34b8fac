from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import Budget, Footprint, factorize, measure, quantize, save_compressed
from lightning_compress.app.dashboard.layers import layer_table, read_manifest
from lightning_compress.app.dashboard.reading import DamagedFileError
from lightning_compress.artifact import read_metadata
from lightning_compress.callbacks.comparison import layer_rows
from lightning_compress.edits import edits_to_json
from lightning_compress.results import Results
from lightning_compress.zoo.feedforward import LeNet5


def table(tmp_path: Path, dense: nn.Module, net: nn.Module, before: Footprint, after: Footprint) -> dict[str, dict]:
    save_compressed(net, tmp_path / "net.safetensors")
    results = Results(before, after, layers=layer_rows(dense, net, before, after))
    data = json.loads(json.dumps(results.to_json()))
    return {row["layer"]: row for row in layer_table(data, read_manifest(tmp_path / "net.safetensors"))}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(512, 1, 8, 8)


def test_ranks_of_factorized_layers(tmp_path: Path, images: torch.Tensor) -> None:
    dense, net = LeNet5(image_size=8), LeNet5(image_size=8)
    before = measure(dense, images)
    factorize(net, images, Budget(macs=0.5))
    found = table(tmp_path, dense, net, before, measure(net, images))

    rank = net.conv2[0].out_channels
    assert found["conv2"]["before"] == [50, 20, 5, 5]
    assert found["conv2"]["after"] == [[rank, 20, 5, 1], [50, rank, 1, 5]]
    assert f"spatial, rank {rank}" in found["conv2"]["notes"]
    assert found["conv2"]["macs"][1] == measure(net, images).layers["conv2.0"] + measure(net, images).layers["conv2.1"]


def test_bits_of_quantized_layers(tmp_path: Path, images: torch.Tensor) -> None:
    dense, net = LeNet5(image_size=8), LeNet5(image_size=8)
    before = measure(dense, images)
    quantize(net, images)
    found = table(tmp_path, dense, net, before, measure(net, images))

    assert list(found) == ["conv1", "conv2", "fc1", "fc2"]
    assert any(note.endswith("-bit integers") for note in found["fc1"]["notes"])


def test_codebooks_and_zeros_of_coded_layers(tmp_path: Path, images: torch.Tensor) -> None:
    dense, net = LeNet5(image_size=8), LeNet5(image_size=8)
    before = measure(dense, images)
    net.fc1.weight.data = (4 * net.fc1.weight.data.clamp(-0.05, 0.05) / 0.05).round() / 80 + 0.0  # no negative zeros
    zeros = float((net.fc1.weight == 0).float().mean())
    found = table(tmp_path, dense, net, before, measure(net, images))

    assert "codebook of 8" in found["fc1"]["notes"]
    assert f"{zeros:.1%} zeros" in found["fc1"]["notes"]
    assert found["fc1"]["stored"] < 4 * net.fc1.weight.numel() / 4


def test_the_header_says_what_the_artifact_does(tmp_path: Path, images: torch.Tensor) -> None:
    net = LeNet5(image_size=8)
    factorize(net, images, Budget(macs=0.5))
    save_compressed(net, tmp_path / "net.safetensors")
    manifest = read_manifest(tmp_path / "net.safetensors")

    assert manifest["edits"] == json.loads(
        json.dumps(edits_to_json(read_metadata(tmp_path / "net.safetensors")["edits"]))
    )


@pytest.mark.parametrize(("kept", "added"), [(40, b""), (0, b"x" * 100), (0, b""), (8, b"{}"), (8, b"{" * 4000)])
def test_damaged_artifacts(tmp_path: Path, kept: int, added: bytes) -> None:
    path = tmp_path / "net.safetensors"
    save_compressed(nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes()[:kept] + added)

    with pytest.raises(DamagedFileError, match=r"net\.safetensors"):
        read_manifest(path)
