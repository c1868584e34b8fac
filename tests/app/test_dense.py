"""Starting from weights of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from lightning_compress.app.build import make_net, make_task
from lightning_compress.app.dense import dense_task, load_weights
from lightning_compress.zoo.tasks import ImageClassifier

Compose = Callable[..., DictConfig]


def task(width: int = 4) -> ImageClassifier:
    return ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(width, 2)), num_classes=2)


@pytest.mark.parametrize("kind", ["network", "task", "lightning"])
def test_weights_of_a_network_of_a_task_and_of_a_lightning_checkpoint_load(tmp_path: Path, kind: str) -> None:
    trained = task()
    state = trained.net.state_dict() if kind == "network" else trained.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if kind == "lightning" else state, tmp_path / "weights.ckpt")
    loaded = task()
    assert not torch.equal(loaded.net[1].weight, trained.net[1].weight)
    load_weights(loaded, tmp_path / "weights.ckpt")
    assert torch.equal(loaded.net[1].weight, trained.net[1].weight)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(task(width=5).state_dict(), tmp_path / "weights.ckpt")
    with pytest.raises(
        ValueError, match=r"weights\.ckpt is of another network.*1 of another shape \['net\.1\.weight'\]"
    ):
        load_weights(task(), tmp_path / "weights.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dense\.ckpt: there is no file .*weights\.ckpt"):
        load_weights(task(), tmp_path / "weights.ckpt")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(task(), tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="something else than tensors"):
        load_weights(task(), tmp_path / "weights.ckpt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_text("these are no weights")
    with pytest.raises(ValueError, match="something else than tensors, or is damaged"):
        load_weights(task(), tmp_path / "weights.ckpt")


def test_a_checkpoint_of_ones_own_is_not_trained_and_not_cached(job: Compose, tmp_path: Path) -> None:
    config = job(f"dense.ckpt={tmp_path / 'weights.pt'}")
    net = make_net(config)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    loaded = dense_task(config, data=None)  # type: ignore[arg-type]  # no data is needed
    expected = make_task(config, net).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not (tmp_path / "cache").exists()
