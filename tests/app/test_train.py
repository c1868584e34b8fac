"""Jobs from end to end: run, run again, interrupted, changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from lightning_compress import load_compressed
from lightning_compress.app import dense, work
from lightning_compress.app.build import make_net
from lightning_compress.results import Results
from lightning_compress.zoo.tasks import ImageClassifier

Compose = Callable[..., DictConfig]


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this should not have been called")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "compressed.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt(monkeypatch: pytest.MonkeyPatch, max_epochs: int, epoch: int) -> None:
    """Press Ctrl-C as an epoch begins, in the run of so many epochs."""
    hook = ImageClassifier.on_train_epoch_start

    def on_train_epoch_start(self: ImageClassifier) -> None:
        if self.trainer.max_epochs == max_epochs and self.current_epoch == epoch:
            raise KeyboardInterrupt
        hook(self)

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", on_train_epoch_start)


def test_a_job_compresses_measures_and_writes(job: Compose, tmp_path: Path) -> None:
    config = job("method.budget.macs=0.4")
    metrics = work.run(config, tmp_path / "job")["metrics"]
    written = json.loads((tmp_path / "job" / "results.json").read_text())
    results = Results.load(tmp_path / "job" / "results.json")
    assert results.compressed is not None
    assert results.compressed.macs <= 0.4 * results.dense.macs
    assert set(written["metrics"]["final"]) == {"val/loss", "val/acc", "test/loss", "test/acc"}
    assert metrics == written["metrics"]
    assert results.metric is not None
    assert results.metric.compressed == pytest.approx(metrics["final"]["val/acc"])  # two ways to the same figure
    assert results.metric.dense == pytest.approx(metrics["dense"]["val/acc"])
    assert written["config"]["method"]["budget"]["macs"] == 0.4
    net = load_compressed(tmp_path / "job" / "compressed.safetensors", make_net(config))
    assert sum(p.numel() for p in net.parameters()) == results.compressed.params
    assert not (tmp_path / "job" / "checkpoints").exists()


@pytest.mark.parametrize("arch", ["deconvolutional", "hierarchical_sparse_coding", "conv_autoencoder", "conv_dbn"])
def test_networks_that_learn_without_labels_bring_their_task(arch: str, job: Compose, tmp_path: Path) -> None:
    config = job(f"arch={arch}", "method=weight_sharing")
    assert config.task._target_.rpartition(".")[2] in ("ImageReconstruction", "ContrastiveDivergence")
    metrics = work.run(config, tmp_path / "job")["metrics"]
    assert {"test/acc", "test/mse", "test/psnr", "test/active"} <= set(metrics["final"])
    results = Results.load(tmp_path / "job" / "results.json")
    assert results.compressed is not None
    assert results.compressed.bytes < 0.5 * results.dense.bytes


def test_a_dense_job_is_trained_on_and_nothing_is_cut(job: Compose, tmp_path: Path) -> None:
    metrics = work.run(job("method=none"), tmp_path / "job")["metrics"]
    assert Results.load(tmp_path / "job" / "results.json").compressed is None
    assert metrics["final"]["val/loss"] != metrics["dense"]["val/loss"]


def test_a_finished_job_is_skipped(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = work.run(job(), tmp_path / "job")["metrics"]
    monkeypatch.setattr(work, "make_data", refuse)
    with caplog.at_level(logging.INFO):
        again = work.run(job("+trainer.enable_checkpointing=true", "~trainer.enable_checkpointing"), tmp_path / "job")
    assert again["metrics"] == first
    assert "finished before" in caplog.text


def test_a_changed_job_runs_again_from_the_beginning(job: Compose, tmp_path: Path) -> None:
    work.run(job(), tmp_path / "job")
    before = weights(tmp_path / "job")
    work.run(job("method.budget.macs=0.3"), tmp_path / "job")
    assert Results.load(tmp_path / "job" / "results.json").budgets[0].requested == 0.3
    assert not same(before, weights(tmp_path / "job"))


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # it is what one goes on from
@pytest.mark.parametrize(
    ("max_epochs", "epoch"), [(2, 1), (4, 0), (4, 1), (4, 3)], ids=["dense", "at once", "between edits", "after edits"]
)
def test_an_interrupted_job_resumes(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_epochs: int, epoch: int
) -> None:
    apart = f"cache_dir={tmp_path / 'other cache'}"
    work.run(job(apart), tmp_path / "uninterrupted")

    with monkeypatch.context() as patched:
        interrupt(patched, max_epochs, epoch)
        with pytest.raises(SystemExit):
            work.run(job(), tmp_path / "job")
    assert not (tmp_path / "job" / "results.json").exists()

    seen: list[tuple[int, int]] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            ImageClassifier,
            "on_train_epoch_start",
            lambda self: seen.append((self.trainer.max_epochs, self.current_epoch)),
        )
        work.run(job(), tmp_path / "job")
    assert [e for m, e in seen if m == max_epochs] == list(range(epoch, max_epochs))  # nothing is trained twice
    assert same(weights(tmp_path / "uninterrupted"), weights(tmp_path / "job"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_job_stopped_between_training_and_testing_trains_no_more(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(work, "_evaluate", refuse)
        with pytest.raises(AssertionError):
            work.run(job(), tmp_path / "job")
    before = weights(tmp_path / "job")
    with monkeypatch.context() as patched:
        patched.setattr(ImageClassifier, "on_train_epoch_start", refuse)
        patched.setattr(dense, "_train", refuse)
        work.run(job(), tmp_path / "job")
    assert same(before, weights(tmp_path / "job"))


def test_the_dense_network_is_trained_once_and_the_cache_changes_nothing(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.run(job(), tmp_path / "first")
    monkeypatch.setattr(dense, "_train", refuse)
    work.run(job(), tmp_path / "second")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    work.run(job("trainer.max_epochs=1", "method.end=0.0", "method.steps=1"), tmp_path / "other epochs")


@pytest.mark.parametrize(
    "change",
    ["seed=1", "arch.width=0.4", "data.batch_size=32", "dense.max_epochs=1", "task.lr=0.2", "dense.task.lr=0.2"],
)
def test_what_determines_the_dense_network_makes_another(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    asked: list[Path] = []

    def note(config: DictConfig, data: Any, path: Path, callbacks: Any) -> None:
        asked.append(path)
        raise InterruptedError

    monkeypatch.setattr(dense, "_train", note)
    fine_tuning = ("method.budget.macs=0.3", "trainer.max_epochs=9", "dense.task.lr=0.1", "task.lr=0.01")
    for overrides in ((), (change,), fine_tuning):
        with pytest.raises(InterruptedError):
            work.run(job(*overrides), tmp_path / "job")
    assert asked[0] != asked[1]
    assert asked[0] == asked[2]


def test_a_wrong_budget_is_refused_before_anything_is_trained(
    job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_train", refuse)
    with pytest.raises(Exception, match=r"macs.*in \(0, 1\].*got 1\.5"):
        work.run(job("method.budget.macs=1.5"), tmp_path / "job")


def test_an_unreachable_budget_is_refused_before_fine_tuning(job: Compose, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lowest"):
        work.run(job("method.budget.macs=0.0001"), tmp_path / "job")
    assert not (tmp_path / "job" / "results.json").exists()
