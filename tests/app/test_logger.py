"""The loggers of a job, W&B with and without an account; nothing here leaves the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from lightning_compress.app.logger import finish_loggers, job_loggers, wandb_logger

pytestmark = pytest.mark.usefixtures("wandb_alone")


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [
        (None, False, True),
        (None, True, False),
        ("offline", True, True),
        ("dryrun", True, True),
        ("online", False, False),
        ("disabled", True, False),
    ],
)
def test_offline_where_there_is_no_key_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, key: bool, offline: bool
) -> None:
    monkeypatch.setattr(wandb, "login", lambda **kwargs: key)
    monkeypatch.delenv("WANDB_MODE")
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    logger = wandb_logger(tmp_path, project="p")
    assert logger._wandb_init["mode"] == ("offline" if offline else None)
    assert wandb_logger(tmp_path, project="p", offline=not offline)._wandb_init["mode"] == (
        None if offline else "offline"
    )


def test_two_jobs_of_one_process_are_two_runs_and_leave_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name in ("one", "other"):
        logger = wandb_logger(tmp_path, project="p", name=name)
        logger.log_metrics({"x": 1.0})
        finish_loggers([logger])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert "WANDB_MODE" not in os.environ


def test_a_logger_without_a_run_ends_without_one(tmp_path: Path) -> None:
    finish_loggers([wandb_logger(tmp_path, project="p")])
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_disabled_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    node = {"_target_": "lightning_compress.app.logger.wandb_logger", "save_dir": str(tmp_path), "project": "p"}
    with job_loggers(OmegaConf.create({"logger": {"wandb": node}, "seed": 1})) as [logger]:
        logger.log_metrics({"x": 1.0})
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_all_loggers_are_made_in_order_and_none_is_possible(tmp_path: Path) -> None:
    csv = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    with job_loggers(OmegaConf.create({"logger": {"one": csv, "gone": None, "other": csv}})) as loggers:
        assert [type(logger) for logger in loggers] == [CSVLogger, CSVLogger]
    for nothing in ({}, None):
        with job_loggers(OmegaConf.create({"logger": nothing})) as loggers:
            assert loggers == []


def test_no_key_where_one_is_needed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    node = {"_target_": "lightning_compress.app.logger.wandb_logger", "save_dir": str(tmp_path), "project": "p"}
    with (
        pytest.raises(MisconfigurationException, match=r"cannot begin a run: .*; logger.wandb.offline=true needs"),
        job_loggers(OmegaConf.create({"logger": {"wandb": node}})),
    ):
        raise AssertionError("never here")
