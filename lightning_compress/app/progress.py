"""How far a sweep is: a line whenever a job ends, whoever runs it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from rich.console import Console

__all__ = ["Progress", "progress_line"]

POLL = 1.0
"""Seconds between two looks."""

AT_ONCE = 1.0
"""Seconds. What took less was finished before: to load PyTorch alone takes longer."""


class Progress(threading.Thread):
    """Prints a line whenever a job of a sweep has ended.

    Jobs may run in this process, in others, or on other machines; what all of them do is leave notes in a folder.

    Args:
        notes: where jobs leave NUMBER.begun.json and NUMBER.json.
        total: how many jobs there will be, if that is known.
        console: where to print.
    """

    def __init__(self, notes: Path, total: int | None, console: Console | None = None) -> None:
        super().__init__(name="sweep progress", daemon=True)
        self.notes, self.total = notes, total
        self.console = console or Console(stderr=True)
        self.began = time.time()
        self._stopped = threading.Event()
        self._ended = 0

    def run(self) -> None:
        """Look, until it is stopped."""
        while not self._stopped.wait(POLL):
            self.look()

    def expect_less(self, count: int) -> None:
        """So many jobs that were counted will not be run."""
        if self.total is not None:
            self.total -= count

    def stop(self) -> None:
        """Look once more, and no further."""
        self._stopped.set()
        self.join()
        self.look()

    def look(self) -> None:
        """Print a line if a job has ended since the last look."""
        ended = [json.loads(note.read_text()) for note in self.notes.glob("??????.json")]
        if len(ended) == self._ended:
            return
        self._ended = len(ended)
        running = len(list(self.notes.glob("*.begun.json"))) - len(ended)
        failed = sum(note["error"] is not None for note in ended)
        worked = sum(note["seconds"] >= AT_ONCE for note in ended)
        line = progress_line(len(ended), failed, running, self.total, worked, time.time() - self.began)
        self.console.print(line, highlight=False, soft_wrap=True)


def progress_line(ended: int, failed: int, running: int, total: int | None, worked: int, seconds: float) -> str:
    """How far a sweep is, in words.

    Args:
        ended: jobs that have ended, failed ones too.
        failed: of these, jobs that failed.
        running: jobs at work.
        total: jobs of the whole sweep, if that is known.
        worked: ended jobs that had not been finished by an earlier sweep.
        seconds: since the sweep began.

    Example:
        >>> progress_line(ended=6, failed=1, running=2, total=24, worked=4, seconds=120.0)
        'sweep: 5 of 24 done, 1 failed, 2 running; about 9 min left'
    """
    parts = [f"{ended - failed}{'' if total is None else f' of {total}'} done"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{running} running"] if running > 0 else []
    line = f"sweep: {', '.join(parts)}"
    if total is not None and worked and ended < total:
        line += f"; about {_duration(seconds / worked * (total - ended))} left"
    return line


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
