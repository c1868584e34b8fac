"""Lines for those who wait: at a terminal, after a while, and never anywhere else."""

from __future__ import annotations

import sys
import threading

import lightning as L
import pytest
import torch

from lightning_compress import Budget, ChannelPruning, waiting
from lightning_compress.waiting import following, show_waiting, working


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(waiting, "_say", lines.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return lines


def test_a_line_appears_while_one_waits(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    monkeypatch.setattr(waiting, "_say", lambda line: (said.append(line), written.set()))
    with working("exporting", patience=0.0):
        assert written.wait(60)
    assert said == ["exporting ..."]


def test_what_is_fast_says_nothing(said: list[str]) -> None:
    threads = threading.active_count()
    with working("exporting", patience=3600.0):
        assert list(following("abc", "fitting layers", patience=3600.0)) == ["a", "b", "c"]
    assert said == []
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(60)
    assert threading.active_count() <= threads


def test_items_are_counted(said: list[str]) -> None:
    assert list(following("abc", "fitting layers", patience=0.0)) == ["a", "b", "c"]
    assert [line.partition(",")[0] for line in said] == ["fitting layers: 1 of 3", "fitting layers: 2 of 3"]


@pytest.mark.parametrize("why", ["no terminal", "switched off", "another rank"])
def test_where_nobody_looks_nothing_is_written(why: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if why == "no terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    if why == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    show_waiting(why != "switched off")
    try:
        with working("exporting", patience=0.0):
            list(following("abc", "fitting layers", patience=0.0))
    finally:
        show_waiting(True)
    assert said == []


@pytest.mark.parametrize("bar", [True, False])
def test_a_trainer_without_a_progress_bar_is_silent(bar: bool, said: list[str]) -> None:
    trainer = L.Trainer(enable_progress_bar=bar, logger=False, enable_checkpointing=False, accelerator="cpu")
    module = L.LightningModule()
    module.net = torch.nn.Conv2d(1, 2, 3)
    callback = ChannelPruning(Budget(macs=0.5))
    callback.setup(trainer, module, "fit")
    list(following("ab", "fitting layers", patience=0.0))
    callback.teardown(trainer, module, "fit")
    assert len(said) == int(bar)
    list(following("ab", "fitting layers", patience=0.0))
    assert len(said) == int(bar) + 1
