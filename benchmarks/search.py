"""A search for the front of accuracy and MACs, against random search with as many trials.

    python benchmarks/search.py [--quick] [--arch NAME] [--seeds N] [--json FILE]

Each side is `lightning-compress sweep=pareto` on digits: NSGA-II and a Gaussian process from the recipe's first points,
and random search in the same space. The hypervolume is the share of the rectangle between the dense network's MACs at
accuracy 0 and no MACs at accuracy 1 that the front dominates, on the validation set, which is what is searched on.
Written to the JSON file search by search, and a search goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pool import show
from benchmarks.results import Found, Results

SIDES = {
    "NSGA-II": ["hydra.sweeper.sampler=nsgaii"],
    "Gaussian process": ["hydra.sweeper.sampler=gp"],
    "random": ["hydra.sweeper.sampler=random", "hydra.sweeper.first=[]"],
}
WIDTH = 0.35  # wider, LeNet-5 keeps its accuracy at any budget, and all searches are alike
COMMON = [
    "sweep=pareto",
    "data=digits",
    f"arch.width={WIDTH}",
    "logger=none",
    "pictures=null",
    "hydra.callbacks.sweep.dashboard=false",
]


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """The area that points (accuracy, cost as a fraction) dominate within the unit square.

    >>> hypervolume([(0.5, 0.5), (1.0, 0.75), (0.4, 0.6)])
    0.375
    """
    area, right = 0.0, 1.0
    for accuracy, cost in sorted(points, key=lambda point: (-point[0], point[1])):  # from the most accurate down
        if cost < right:
            area += accuracy * (right - cost)
            right = cost
    return area


def search(arch: str, side: str, seed: int, trials: int, work: Path) -> Found:
    """Run a search, or what is left of it, and read its jobs."""
    folder = work / f"{arch}-{side}-{trials}-{seed}"
    arguments = [f"output_dir={folder}", f"cache_dir={work / 'cache'}", f"hydra.sweeper.n_trials={trials}"]
    command = [sys.executable, "-m", "lightning_compress.app.train", *COMMON, f"arch={arch}", *SIDES[side], *arguments]
    done = subprocess.run(
        [*command, f"hydra.sweeper.seed={seed}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    jobs = [json.loads(file.read_text()) for file in folder.glob("*/results.json")]
    if "the front of" not in done.stdout:
        raise RuntimeError(done.stderr)
    points = [
        (job["metrics"]["final"]["val/acc"], job["figures"]["compressed/macs"] / job["figures"]["dense/macs"])
        for job in jobs
    ]
    return Found(case_of(arch), side, {"hypervolume": hypervolume(points), "jobs": len(points)}, seed)


def case_of(arch: str) -> str:
    """What the JSON file calls a network's searches."""
    return f"{arch} of {WIDTH:g} of its width, digits"


def print_table(results: Results, case: str, console: Console) -> None:
    """The median and each seed's hypervolume."""
    table = Table(title=case, title_justify="left")
    for column in ("search", "hypervolume, median", "each seed", "jobs"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for side in SIDES:
        metrics = results.rows.get(case, {}).get(side)
        if metrics is not None:
            volumes, jobs = metrics["hypervolume"], metrics["jobs"]
            each = " ".join(f"{volume:.4f}" for volume in volumes)
            table.add_row(side, f"{statistics.median(volumes):.4f}", each, " ".join(map(str, jobs)))
    console.print(table)


def main() -> None:
    """Run the searches that are not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="6 trials, 1 seed")
    add("--seeds", type=int, default=3)
    add("--arch", default="lenet5", help="the network; %(default)s")
    add("--trials", type=int, default=40)
    add("--work", type=Path, help="for jobs and dense networks; a temporary folder if none is named")
    add("--json", type=Path, metavar="FILE")
    add("--table", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    arguments = parser.parse_args()
    seeds, trials = (1, 6) if arguments.quick else (arguments.seeds, arguments.trials)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        results = Results("search", arguments.json or work / "search.json", {"trials": trials})
        for seed in range(seeds):
            for side in SIDES:
                if not results.has(case_of(arguments.arch), side, seed):
                    print(f"{side}, seed {seed}", file=sys.stderr, flush=True)
                    results.add([search(arguments.arch, side, seed, trials, work)])
        show(lambda console: print_table(results, case_of(arguments.arch), console), arguments.table)


if __name__ == "__main__":
    main()
