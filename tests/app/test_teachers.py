"""Teachers from the command line: trained once, in chains, beside a method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from lightning_compress.app import work
from lightning_compress.app.build import make_net
from lightning_compress.callbacks.snapshot import Snapshot

Compose = Callable[..., DictConfig]
TAUGHT = ("method=distillation", "arch@teacher.net=lenet5", "teacher.net.width=0.4", "epochs.dense=2")


def cached(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "cache").glob("*.ckpt"))


def test_a_teacher_is_trained_once(job: Compose, tmp_path: Path) -> None:
    work.run(job(*TAUGHT), tmp_path / "one")
    first = cached(tmp_path)
    assert len(first) == 2  # the teacher and the dense student
    work.run(job(*TAUGHT, "method.task_weight=0.5"), tmp_path / "two")
    assert cached(tmp_path) == first
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results["metrics"]["final"]) >= {"val/acc", "test/acc"}


def test_a_teacher_of_ones_own(job: Compose, tmp_path: Path) -> None:
    config = job(*TAUGHT, f"teacher.ckpt={tmp_path / 'own.ckpt'}")
    with pytest.raises(FileNotFoundError, match=r"teacher\.ckpt: there is no file .*own\.ckpt"):
        work.run(config, tmp_path / "job")
    net = make_net(job("arch.width=0.4"))
    torch.save(net.state_dict(), tmp_path / "own.ckpt")
    work.run(config, tmp_path / "job")
    assert len(cached(tmp_path)) == 1  # the student only


def test_a_chain_of_generations(job: Compose, tmp_path: Path) -> None:
    """Each learns from the one before, and starts from another seed."""
    chain = ("+arch@teacher.teacher.net=lenet5", "teacher.teacher.net.width=0.4")
    work.run(job(*TAUGHT, *chain), tmp_path / "job")
    files = cached(tmp_path)
    assert len(files) == 3
    weights = [torch.load(file, weights_only=True)["state_dict"]["net.conv1.weight"] for file in files]
    wide = [w for w in weights if w.shape == max(weights, key=torch.numel).shape]
    assert len(wide) == 2
    assert not torch.equal(*wide)


def test_the_dense_network_teaches_any_method(job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(Snapshot, "save", lambda snapshot, trainer: saved.append(snapshot.name))
    work.run(job("distill=self", "method.budget.macs=0.5"), tmp_path / "job")
    assert saved


def test_a_method_without_its_teacher_is_refused(job: Compose, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"say which with arch@teacher\.net=NAME"):
        work.run(job("method=distillation", "teacher.net=null"), tmp_path / "job")
