"""Runs side by side in processes of their own, kept as they end."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.results import Found, Results
from lightning_compress.files import write_atomic

__all__ = ["Work", "add_options", "begin", "console_for", "run_all", "show"]

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


def add_options(parser: argparse.ArgumentParser, work: Path) -> None:
    """The options that benchmarks of many runs have in common."""
    add = parser.add_argument
    add("--fashion-mnist", type=Path, default=Path("data"), metavar="FOLDER", help="of its four files")
    add("--work", type=Path, default=work, metavar="FOLDER", help="for dense networks")
    add("--json", type=Path, metavar="FILE", help="results; WORK/quick.json or WORK/full.json")
    add("--table", type=Path, metavar="FILE", help="write the tables there too, as Markdown")
    jobs = 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)
    add("--jobs", type=int, default=jobs, help="processes side by side; here: %(default)s")
    add("--threads", type=int, default=1, help="of torch, in each of them")
    add("--accelerator", default="auto", help="Lightning's: cpu, gpu, ...")


def begin(
    benchmark: str, options: argparse.Namespace, parser: argparse.ArgumentParser, recipe: Any, missing: Iterable[str]
) -> tuple[Results, Console]:
    """What a run begins with: what is left out is named, and the results so far are read.

    Args:
        benchmark: its name.
        options: of the command line, see `add_options`, and `quick`.
        parser: refuses a file of another recipe.
        recipe: a dataclass.
        missing: packages that are not installed.
    """
    console = console_for()
    if missing := sorted(missing):
        console.print(f"Left out, not installed: {', '.join(missing)} (benchmarks/README.md says how to)")
    path = options.json or options.work / f"{'quick' if options.quick else 'full'}.json"
    try:
        results = Results(benchmark, path, asdict(recipe))
    except ValueError as error:
        parser.error(str(error))
    options.work.mkdir(parents=True, exist_ok=True)
    return results, console


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
