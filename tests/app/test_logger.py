"""W&B with and without an account; nothing here leaves the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import wandb

from lightning_compress.app.logger import finish_loggers, wandb_logger


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what WandbLogger writes into the environment."""
    monkeypatch.setenv("WANDB_MODE", os.environ.get("WANDB_MODE", ""))


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [
        ("", False, True),
        ("", True, False),
        ("offline", True, True),
        ("online", False, False),
        ("disabled", True, False),
    ],
)
def test_offline_where_there_is_no_key_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, key: bool, offline: bool
) -> None:
    monkeypatch.setattr(wandb, "login", lambda **kwargs: key)
    monkeypatch.setenv("WANDB_MODE", mode)
    for _ in range(2):  # the first logger leaves its mark on the environment
        logger = wandb_logger(str(tmp_path), project="p")
        assert logger._offline is offline
        assert logger._wandb_init.get("mode") == ("offline" if offline else None)


def test_two_jobs_of_one_process_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(wandb, "login", lambda **kwargs: False)
    for name in ("one", "other"):
        logger = wandb_logger(str(tmp_path), project="p", name=name)
        logger.log_metrics({"x": 1.0})
        finish_loggers([logger])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
