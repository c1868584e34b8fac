"""Every preset of conf/experiment runs: what it names is there, in the network that it chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_compress.app import work
from tests.app.test_conf import OPTIONS

EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
SHORT = ("trainer=debug", "logger=none", "dense.max_epochs=1", "trainer.max_epochs=3", "report.latency=false")


@pytest.mark.filterwarnings("ignore:training ended before")  # in so few steps
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_runs(experiment: str, tmp_path: Path) -> None:
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}", *SHORT, f"output_dir={tmp_path}"])
    metrics = work.run(config, tmp_path / "job")["metrics"]
    assert 0 <= metrics["final"]["test/acc"] <= 1
    assert (tmp_path / "job" / "compressed.safetensors").is_file()
