"""What a person at a terminal sees who waits: a line, once something has taken longer than some seconds.

Lines, no bars: a Trainer's own progress bar may be on the screen at the same time. Nothing here draws a random number,
and where nobody looks (a file, a pipe, `Trainer(enable_progress_bar=False)`) nothing is written.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["following", "show_waiting", "working"]

PATIENCE = 5.0
"""Seconds without a word."""

_Item = TypeVar("_Item")
_shown = ContextVar("shown", default=True)


def show_waiting(shown: bool) -> None:
    """Whether lines are written from now on.

    Args:
        shown: they are, where there is a terminal.

    Example:
        >>> show_waiting(False)
        >>> with working("counting"):
        ...     sum(range(10))
        45
        >>> show_waiting(True)
    """
    _shown.set(shown)


@contextmanager
def working(doing: str, patience: float | None = None) -> Iterator[None]:
    """Say what is being done, if the block takes longer than some seconds.

    Args:
        doing: what is said.
        patience: seconds; by default `PATIENCE`.

    Example:
        >>> with working("measuring latency"):  # at once: nothing is said
        ...     sum(range(10))
        45
    """
    timer = threading.Timer(PATIENCE if patience is None else patience, _say, [f"{doing} ..."])
    timer.daemon = True
    if not _visible():
        yield
        return
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def following(items: Iterable[_Item], doing: str, patience: float | None = None) -> Iterator[_Item]:
    """Go through some items, and say every few seconds how many are done and about how long the rest will take.

    Args:
        items: what to go through; they are counted first.
        doing: what is said.
        patience: seconds between two lines; by default `PATIENCE`.

    Example:
        >>> list(following([1, 2, 3], "fitting layers"))
        [1, 2, 3]
    """
    found = list(items)
    patience = PATIENCE if patience is None else patience
    began = said = time.monotonic()
    for number, item in enumerate(found):
        yield item
        now = time.monotonic()
        if now - said >= patience and number + 1 < len(found):
            said = now
            left = (now - began) / (number + 1) * (len(found) - number - 1)
            if _visible():
                _say(f"{doing}: {number + 1} of {len(found)}, about {left:.0f} s left")


def _visible() -> bool:
    """Whether somebody looks: at a terminal or in a notebook, and in one process of several."""
    if not _shown.get() or os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
