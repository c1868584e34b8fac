"""Folders, digests and locks."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lightning_compress.app.jobs import JOB, RESULTS, Job, alone, config_digest, fail, folder_name, read_json


def config(**changes: object) -> DictConfig:
    parts = {
        "seed": 1,
        "report": {"table": True},
        "data": {"classes": 10},
        "arch": {"width": "${data.classes}"},
        "trainer": {"max_epochs": 2},
    }
    return OmegaConf.merge(OmegaConf.create(parts), OmegaConf.create(changes))


def test_a_name_that_fits_stays_and_others_stay_apart() -> None:
    assert folder_name("arch=resnet20,seed=1") == "arch=resnet20,seed=1"
    assert folder_name("a=True,b=False") == folder_name("a=true,b=false")
    names = {folder_name("root=/a/b"), folder_name("root=_a_b"), folder_name("root=/a_b"), folder_name("root=a b")}
    assert len(names) == 4
    long = [folder_name("x" * 500 + end) for end in "ab"]
    assert long[0] != long[1]
    assert max(map(len, long)) < 140
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"data": {"classes": 3}}, {"trainer": {"max_epochs": 3}}, {"arch": {"width": 9}}, {"more": 1}],
    ids=str,
)
def test_a_digest_changes_with_what_counts(change: dict[str, object]) -> None:
    assert config_digest(config(**change)) != config_digest(config())


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "x"},
        {"logger": {"a": "${not:there}"}},
        {"trainer": {"enable_progress_bar": False}},
        {"report": {"table": False}},
    ],
    ids=str,
)
def test_a_digest_does_not_change_with_places_and_looks(change: dict[str, object]) -> None:
    assert config_digest(config(**change)) == config_digest(config())


def test_a_digest_of_parts() -> None:
    one, other = config(), config(seed=2, trainer={"max_epochs": 7})
    assert config_digest(one, ["arch", "data"]) == config_digest(other, ["arch", "data"])
    assert config_digest(one, ["trainer"]) != config_digest(other, ["trainer"])
    assert config_digest(one, ["trainer"], ["trainer.max_epochs"]) == config_digest(
        other, ["trainer"], ["trainer.max_epochs"]
    )
    assert config_digest(config(data={"classes": 3}), ["arch"]) != config_digest(one, ["arch"])  # by reference


def test_a_folder_from_beginning_to_end(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "digest")
    assert job.finished() is None
    assert job.begin() is None
    job.checkpoints.mkdir()
    last = job.checkpoints / "last.ckpt"
    last.touch()
    assert job.begin() == last
    (job.folder / "results.json").write_text(json.dumps({"format": 1}))  # the report's part
    assert job.finished() is None
    metrics = {"dense": {"test/acc": 0.5}, "final": {"test/acc": 0.25}}
    assert read_json(job.folder / JOB)["status"] == "running"
    job.finish(config(), metrics, {"dense/macs": 8.0}, {"name": "mine"})
    finished = job.finished()
    assert finished is not None
    assert (finished["metrics"], finished["figures"], finished["job"]) == (
        metrics,
        {"dense/macs": 8.0},
        {"name": "mine"},
    )
    assert read_json(job.folder / JOB) == {
        "config_digest": "digest",
        "status": "finished",
        "error": None,
        "job": {"name": "mine"},
    }
    assert not job.checkpoints.exists()
    results = read_json(job.folder / RESULTS)
    assert results["format"] == 1
    assert results["config"]["arch"] == {"width": 10}


def test_a_failed_job_says_of_what_and_can_go_on(tmp_path: Path) -> None:
    job = Job(tmp_path, "digest")
    fail(job.folder, "no such network", {"name": "mine"})  # before anything was begun
    assert read_json(tmp_path / JOB) == {"status": "failed", "error": "no such network", "job": {"name": "mine"}}
    job.begin()
    job.checkpoints.mkdir()
    (job.checkpoints / "last.ckpt").touch()
    fail(job.folder, "out of memory", {})
    assert job.begin() == job.checkpoints / "last.ckpt"
    assert read_json(tmp_path / JOB)["error"] is None


def test_what_another_configuration_left_is_removed(tmp_path: Path) -> None:
    old = Job(tmp_path, "old")
    old.begin()
    old.checkpoints.mkdir()
    for file in (old.checkpoints / "last.ckpt", old.artifact, tmp_path / "results.json", tmp_path / "mine.txt"):
        file.write_text("{}")
    assert Job(tmp_path, "new").begin() is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["job.json", "mine.txt"]


def test_the_second_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "training it; waiting" in record.getMessage():
                waiting.set()

    def second() -> None:
        with alone(tmp_path / "deep" / ".lock", "training it"):
            order.append("second")

    order: list[str] = []
    logger = logging.getLogger("lightning_compress.app.jobs")
    listener, level = Listener(), logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        thread = threading.Thread(target=second)
        with alone(tmp_path / "deep" / ".lock", "training it"):
            thread.start()
            assert waiting.wait(timeout=60)
            order.append("first")
        thread.join(timeout=60)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    assert order == ["first", "second"]
