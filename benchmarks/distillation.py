"""How well a student learns from a teacher: our losses beside peers' losses, in the same Lightning run.

    python benchmarks/distillation.py [--quick] [--cifar10 FOLDER] [--seeds N] [--jobs N] [--json FILE]

For each data set and pair, each side trains the same student from the same initial weights on the same batches, with
the `Distillation` callback; only its losses differ (`distillation_sides.py`). Accuracy is that of the whole test set
after the last epoch. At the end come tables and, unless --no-overhead is given, what the callback costs a step.

Every run is written to the JSON file as soon as it ends; started again with the same file, the benchmark goes on where
it was, or prints the tables if nothing is left to do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_overhead import compare, print_overhead
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
from benchmarks.distillation_sides import ALONE, PAIRS, PLAIN, SIDES, missing_peers
from lightning_compress.files import write_atomic

NOISE = 2.0  # standard errors below which a difference is called noise


class Results:
    """The JSON file: the recipes, and what each run gave.

    Args:
        path: the file; read if it exists.
        recipes: by pair; a file of other recipes is refused.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, recipes: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"benchmark": "distillation", "recipes": recipes, "rows": [], "overhead": None}
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("recipes") != recipes:
                raise ValueError(f"{path} holds results of other recipes: give another --json FILE, or delete it")
            self.data = found
        self.data["command"] = "python " + " ".join(sys.argv)
        self.data["torch"] = torch.__version__

    @property
    def rows(self) -> list[Row]:
        """All runs so far."""
        return [Row(**row) for row in self.data["rows"]]

    def add(self, row: Row) -> None:
        """Keep one more run."""
        if row not in self.rows:
            self.data["rows"].append(asdict(row))
        self.write()

    def write(self) -> None:
        """All of it, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.data, indent=1) + "\n")


def collect(futures: list[Future[Row]], results: Results, console: Console) -> None:
    """Keep each run as it ends; say how far it is, and how long the rest will take if it goes on like this."""
    start = time.perf_counter()
    for done, future in enumerate(as_completed(futures), 1):
        row = future.result()
        results.add(row)
        left = (time.perf_counter() - start) / done * (len(futures) - done)
        console.print(
            f"[{done}/{len(futures)}] {row.data}, {row.pair}, {row.side}, seed {row.seed}: {row.accuracy:.2%}, "
            f"{row.seconds:.0f} s; about {left / 60:.0f} min left",
            markup=False,
            highlight=False,
        )


def train_all(
    cells: list[Cell], sides: list[str], seeds: int, place: Place, results: Results, jobs: int, threads: int
) -> None:
    """Train what is not in the results yet: first the teachers, then students, one seed of all after the other."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    had = {(row.data, row.pair, row.side, row.seed) for row in results.rows}
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


def difference(ours: dict[int, float], base: dict[int, float]) -> str:
    """Percentage points between two sides, seed by seed, with the standard error of their mean."""
    pairs = [100 * (ours[seed] - base[seed]) for seed in ours if seed in base]
    if not pairs:
        return ""
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.2f} (one seed)"
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.2f} ± {error:.2f}" + (" (noise)" if abs(mean) < NOISE * error or mean == 0 else "")


def print_tables(rows: list[Row], recipes: dict[str, Any], console: Console) -> None:
    """One table for each data set and pair."""
    cells: dict[tuple[str, str], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cells[row.data, row.pair][row.side][row.seed] = row
    for data in DATA:
        for pair in PAIRS:
            if (data, pair) in cells:
                _print_table(f"{DATA[data]}, {PAIRS[pair].title}", cells[data, pair], console)
    console.print(
        f"Top-1 on the test set after the last epoch, mean ± standard deviation over the seeds, in %. Differences are "
        f"taken seed by seed, in percentage points, ± their standard error; (noise): below {NOISE:g} of them.",
        highlight=False,
    )
    for pair, recipe in recipes.items():
        console.print(f"{pair}: " + ", ".join(f"{k} {v}" for k, v in recipe.items()), highlight=False)


def _print_table(title: str, found: dict[str, dict[int, Row]], console: Console) -> None:
    taught = next(iter(found["teacher"].values()))
    console.print(f"{title} (teacher: {taught.accuracy:.2%})", highlight=False)
    table = Table(box=box.MARKDOWN)
    for column in ("side", "seeds", "accuracy", f"− {ALONE}", f"− {PLAIN}", "CPU s"):
        table.add_column(column, justify="left" if column == "side" else "right")
    scores = {side: {seed: row.accuracy for seed, row in found[side].items()} for side in SIDES if side in found}
    for side, by_seed in scores.items():
        values = [100 * value for value in by_seed.values()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        differences = ("" if side == base else difference(by_seed, scores.get(base, {})) for base in (ALONE, PLAIN))
        seconds = statistics.median(row.cpu_seconds for row in found[side].values())
        table.add_row(side, str(len(values)), f"{statistics.mean(values):.2f}{spread}", *differences, f"{seconds:.0f}")
    console.print(table)
    console.print()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, few samples and epochs: for a CPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument(
        "--only", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE", help="of: %(choices)s"
    )
    parser.add_argument("--fashion-mnist", type=Path, default=Path("data"), metavar="FOLDER", help="of its four files")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="of train/<class>/ and test/<class>/")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/distillation"), metavar="FOLDER", help="for teachers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; WORK/quick.json or WORK/full.json")
    jobs = 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes that train side by side; here: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each of them")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: cpu, gpu, ...")
    parser.add_argument("--overhead", action=argparse.BooleanOptionalAction, help="measure it only, or not at all")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    recipes = {pair: asdict(recipe) for pair, recipe in (QUICK if options.quick else FULL).items()}
    try:
        results = Results(options.json or options.work / f"{'quick' if options.quick else 'full'}.json", recipes)
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
        cells = [Cell(d, p, (QUICK if options.quick else FULL)[p]) for d in options.data for p in options.pairs]
        options.work.mkdir(parents=True, exist_ok=True)
        place = Place(options.fashion_mnist, options.cifar10, options.work, options.accelerator)
        train_all(cells, sides, options.seeds, place, results, options.jobs, options.threads)
        print_tables(results.rows, recipes, console)
    if options.overhead or (options.overhead is None and results.data["overhead"] is None):
        start_worker(1)
        results.data["overhead"] = compare(*((10, 8, 16) if options.quick else (16, 12, 32)))
        results.write()
    if results.data["overhead"]:
        print_overhead(results.data["overhead"], console)


if __name__ == "__main__":
    main()
