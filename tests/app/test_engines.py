"""A sweep comes to the same, whoever runs it and however often it is killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.app.test_sweep import SMALL, command

FEW = ["arch=lenet5", "method=channel_pruning,low_rank", "method.budget.macs=0.7,0.5"]
MANY = [
    "arch=lenet5,vgg_small,resnet20",
    "method=channel_pruning,channel_pruning_group_norm,low_rank,low_rank_channel",
    "method.budget.macs=0.7,0.5",
    "trainer.max_epochs=3",
    "dense.max_epochs=4",
]
COMMON = ["-m", "logger=none", "pictures=null", "report.latency=false", "report.table=false"]
SIZES = {
    "few": [*(part for part in SMALL if not part.startswith("arch=")), "trainer.max_epochs=2", *FEW],
    "many": ["trainer.enable_progress_bar=false", *MANY],
}
ENGINES = {
    "joblib": ["launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["launcher=submitit_local"],
    "ray": ["launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"],
}
Outcome = dict[str, tuple[dict[str, Any], dict[str, Any], str]]


def outcome(folder: Path) -> Outcome:
    """Of each job: its metrics and figures, and a hash of its artifact."""
    found = {}
    for file in sorted((folder / "outputs").glob("*/results.json")):
        results = json.loads(file.read_text())
        artifact = hashlib.sha256((file.parent / "compressed.safetensors").read_bytes()).hexdigest()
        found[file.parent.name] = (results["metrics"], results["figures"], artifact)
    return found


def stamps(folder: Path) -> dict[Path, int]:
    """When what is finished was written: of jobs, and of dense networks."""
    done = [*folder.glob("outputs/cache/*.ckpt"), *folder.glob("outputs/*/results.json")]
    return {path: path.stat().st_mtime_ns for path in done if path.suffix == ".ckpt" or finished(path)}


def finished(results: Path) -> bool:
    return "metrics" in json.loads(results.read_text())


def killed(folder: Path, arguments: list[str], jobs: int, delay: float) -> None:
    """Start a sweep, and kill it a moment after so many of its jobs are finished."""
    child = subprocess.Popen(
        [sys.executable, "-m", "lightning_compress.app.train", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while child.poll() is None and (not (folder / "outputs").is_dir() or len(stamps(folder)) < jobs):
        time.sleep(0.05)
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@pytest.fixture(scope="module", params=["few", pytest.param("many", marks=pytest.mark.slow)])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Outcome]:
    """The arguments of a sweep, and what it comes to where nothing happens to it."""
    folder = tmp_path_factory.mktemp(request.param)
    arguments = [*COMMON, *SIZES[request.param]]
    done = command(folder, *arguments)
    assert done.returncode == 0, done.stderr
    found = outcome(folder)
    assert len(found) == {"few": 4, "many": 24}[request.param]
    return arguments, found


def test_killed_and_started_again_it_comes_to_the_same(undisturbed: tuple[list[str], Outcome], tmp_path: Path) -> None:
    arguments, expected = undisturbed
    moments = random.Random(0)
    nets = len({name.partition("arch=")[2].partition(",")[0] for name in expected})
    seen: dict[Path, int] = {}
    for jobs in sorted([0, *moments.sample(range(1, len(expected) + nets - 1), 2)]):
        killed(tmp_path, arguments, jobs, delay=4 * moments.random())
        now = stamps(tmp_path)
        assert {path: now[path] for path in seen} == seen  # nothing is done twice
        seen = now
    done = command(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert {path: stamps(tmp_path)[path] for path in seen} == seen
    assert outcome(tmp_path) == expected
    assert len(list((tmp_path / "outputs" / "cache").glob("*.ckpt"))) == nets
    assert f"{len(expected)} of {len(expected)} done" in done.stderr
    assert not list((tmp_path / "outputs").glob(".sweep-*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_comes_to_the_same(undisturbed: tuple[list[str], Outcome], tmp_path: Path, engine: str) -> None:
    arguments, expected = undisturbed
    done = command(tmp_path, *arguments, *ENGINES[engine])
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path) == expected
    _, _, table = done.stdout.partition("dense → now")
    assert sum(line.startswith("│") for line in table.splitlines()) >= len(expected)
