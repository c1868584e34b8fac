"""How far a sweep is, from the notes that its jobs leave."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_compress.app.jobs import write_json
from lightning_compress.app.progress import Progress, progress_line


def test_a_line_whenever_a_job_has_ended(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    progress = Progress(tmp_path, 4, console)

    def lines() -> list[str]:
        progress.look()
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    for number in range(3):
        write_json(tmp_path / f"{number:06d}.begun.json", {"at": 0.0})
    assert lines() == []
    write_json(tmp_path / "000000.json", {"error": None, "seconds": 0.1})  # finished by an earlier sweep
    assert lines() == ["sweep: 1 of 4 done, 2 running"]
    write_json(tmp_path / "000002.json", {"error": "no such network", "seconds": 3.0})
    progress.began -= 30.0
    assert len(lines()) == 2
    assert lines()[1].startswith("sweep: 1 of 4 done, 1 failed, 1 running; about ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "sweep: 2 of 8 done, 1 running; about 15 min left"),
        ({"seconds": 10.0}, "sweep: 2 of 8 done, 1 running; about 30 s left"),
        ({"seconds": 36_000.0}, "sweep: 2 of 8 done, 1 running; about 30 h left"),
        ({"worked": 0}, "sweep: 2 of 8 done, 1 running"),
        ({"total": None}, "sweep: 2 done, 1 running"),
        ({"ended": 8, "running": 0, "failed": 8}, "sweep: 0 of 8 done, 8 failed"),
    ],
)
def test_the_line(changes: dict[str, Any], line: str) -> None:
    given = {"ended": 2, "failed": 0, "running": 1, "total": 8, "worked": 2, "seconds": 300.0} | changes
    assert progress_line(**given) == line
