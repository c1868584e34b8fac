"""Jobs small enough to run many of."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tests.app.fake_wandb import environment

SMALL = ("arch=lenet5", "arch.width=0.3", "trainer=debug", "logger=none", "dense.max_epochs=2", "trainer.max_epochs=4")
Compose = Callable[..., DictConfig]


@pytest.fixture
def job(tmp_path: Path) -> Compose:
    """Compose the configuration of a small job that writes below `tmp_path`; later overrides outweigh."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_module("lightning_compress.conf", version_base="1.3"):
            return compose("train", overrides=[*SMALL, f"output_dir={tmp_path}", "report.latency=false", *overrides])

    return composed


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning switches Ctrl-C off once it was pressed; switch it on again."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B in this process without an account, and as if it had not been used before."""
    import wandb

    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield
    wandb.teardown()
