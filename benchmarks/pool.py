"""Runs side by side in processes of their own, kept as they end."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.results import Found, Results
from lightning_compress.files import write_atomic

__all__ = ["Work", "console_for", "run_all", "show"]

WIDTH = 300  # of tables that go to a file
Work = tuple[Callable[..., Found], tuple[Any, ...]]
# Activations of a few megabytes are taken from the heap instead of being mapped and given back each time: MobileNetV2
# trains and runs several times faster so. Latency is measured without it, as a user would.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "268435456"}


def console_for(file: io.TextIOBase | None = None) -> Console:
    """Plain text that keeps its lines whole in a file."""
    wide = file is not None or not sys.stdout.isatty()
    return Console(file=file, width=WIDTH if wide else None, markup=False, highlight=False)


def show(print_to: Callable[[Console], None], path: Path | None) -> None:
    """Print tables, and write them to a file as Markdown, if one is asked for."""
    print_to(console_for())
    if path is not None:
        text = io.StringIO()
        print_to(console_for(text))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines()) + "\n")


@contextmanager
def heap() -> Iterator[None]:
    """Processes that are started in the block keep their memory; see `HEAP`."""
    added = [name for name in HEAP if name not in os.environ]
    os.environ.update({name: HEAP[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def run_all(groups: list[list[Work]], results: Results, jobs: int, start: Callable[[], None], console: Console) -> None:
    """Run groups one after the other, the work of one side by side; keep each run as it ends."""
    with heap(), ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start) as pool:
        try:
            for group in groups:
                begin = time.perf_counter()
                futures: list[Future[Found]] = [pool.submit(run, *args) for run, args in group]
                for done, future in enumerate(as_completed(futures), 1):
                    found = future.result()
                    results.add([found])
                    left = (time.perf_counter() - begin) / done * (len(futures) - done)
                    score = found.metrics.get("refused") or f"{found.metrics['accuracy']:.2%}"
                    seed = "" if found.seed is None else f", seed {found.seed}"
                    console.print(
                        f"[{done}/{len(futures)}] {found.case}; {found.side}{seed}: {score}; about {left / 60:.0f} min"
                    )
        finally:
            pool.shutdown(cancel_futures=True)
