"""How well a student learns from a teacher: our losses beside peers' losses, in the same Lightning run.

    python benchmarks/distillation.py [--quick] [--cifar10 FOLDER] [--seeds N] [--jobs N] [--json FILE] [--table FILE]

For each data set and pair, each side trains the same student from the same initial weights on the same batches, with
the `Distillation` callback; only its losses differ (`distillation_sides.py`). Accuracy is that of the whole test set
after the last epoch. At the end come tables and, unless --no-overhead is given, what the callback costs a step.

Every run is written to the JSON file as soon as it ends; started again with the same file, the benchmark goes on where
it was, or prints the tables if nothing is left to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_overhead import compare, print_overhead
from benchmarks.distillation_results import Results, print_tables
from benchmarks.distillation_runs import (
    DATA,
    FULL,
    QUICK,
    Cell,
    Place,
    Row,
    prepare,
    start_worker,
    train_student,
    train_teacher,
)
from benchmarks.distillation_sides import PAIRS, SIDES, USUAL, missing_peers
from benchmarks.pool import console_for, show


def collect(futures: list[Future[Row]], results: Results, console: Console) -> None:
    """Keep each run as it ends; say how far it is, and how long the rest will take if it goes on like this."""
    start = time.perf_counter()
    for done, future in enumerate(as_completed(futures), 1):
        row = future.result()
        results.add(row)
        left = (time.perf_counter() - start) / done * (len(futures) - done)
        console.print(
            f"[{done}/{len(futures)}] {row.data}, {row.pair}, {row.side}, seed {row.seed}: {row.accuracy:.2%}, "
            f"{row.seconds:.0f} s; about {left / 60:.0f} min left"
        )


def train_all(
    cells: list[Cell], sides: list[str], seeds: int, place: Place, results: Results, jobs: int, threads: int
) -> None:
    """Train what is not in the results yet: first the teachers, then students, one seed of all after the other."""
    console = console_for()
    had = {(run.data, run.pair, run.side, run.seed) for run in results.runs}
    left = [
        (cell, side, seed)
        for seed in range(seeds)
        for cell in cells
        for side in sides
        if (cell.data, cell.pair, side, seed) not in had
    ]
    cells = [cell for cell in cells if any(cell == c for c, _, _ in left)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,)) as pool:
        try:
            for cell in {(cell.data, cell.recipe.image_size): cell for cell in cells}.values():
                pool.submit(prepare, cell, place).result()  # one at a time, so that images are decoded once
            collect([pool.submit(train_teacher, cell, place) for cell in cells], results, console)
            collect(
                [pool.submit(train_student, cell, place, side, seed) for cell, side, seed in left], results, console
            )
        finally:
            pool.shutdown(cancel_futures=True)


def report(results: Results, console: Console) -> None:
    """All that was measured."""
    if results.runs:
        print_tables(results, console)
        console.print()
    if results.overhead:
        print_overhead(results.overhead, console)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, few samples and epochs: for a CPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--only", nargs="+", choices=list(SIDES), default=USUAL, metavar="SIDE", help="of: %(choices)s")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("data"), metavar="FOLDER", help="of its four files")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="of train/<class>/ and test/<class>/")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/distillation"), metavar="FOLDER", help="for teachers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; WORK/quick.json or WORK/full.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables there too, as Markdown")
    jobs = 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes that train side by side; here: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each of them")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: cpu, gpu, ...")
    parser.add_argument("--overhead", action=argparse.BooleanOptionalAction, help="measure it only, or not at all")
    options = parser.parse_args()
    console = console_for()
    recipes = QUICK if options.quick else FULL
    path = options.json or options.work / f"{'quick' if options.quick else 'full'}.json"
    try:
        results = Results(path, {pair: asdict(recipe) for pair, recipe in recipes.items()})
    except ValueError as error:
        parser.error(str(error))

    if not options.overhead:
        missing = missing_peers()
        if missing:
            console.print(f"Left out, not installed: {', '.join(missing)} (benchmarks/README.md says how to)")
        sides = [side for side in SIDES if side in options.only and SIDES[side].peer not in missing]
        if options.cifar10 is None and "cifar10" in options.data:
            console.print("Left out: CIFAR-10, for want of --cifar10 FOLDER (benchmarks/README.md says of what)")
            options.data.remove("cifar10")
        cells = [Cell(data, pair, recipes[pair]) for data in options.data for pair in options.pairs]
        options.work.mkdir(parents=True, exist_ok=True)
        place = Place(options.fashion_mnist, options.cifar10, options.work, options.accelerator)
        train_all(cells, sides, options.seeds, place, results, options.jobs, options.threads)
    if options.overhead or (options.overhead is None and not results.overhead):
        start_worker(1)
        results.overhead = compare(*((10, 8, 16) if options.quick else (16, 12, 32)))
        results.write()
    show(lambda console: report(results, console), options.table)


if __name__ == "__main__":
    main()
