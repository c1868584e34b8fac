"""What low-rank factorization and compact filters keep without training, recover with little, and are worth in time.

    python benchmarks/training_free.py [--quick] [--cifar10 FOLDER] [--seeds N] [--jobs N] [--json FILE] [--table FILE]

Four parts, for VGG-small, ResNet-20 and MobileNetV2-small on Fashion-MNIST and CIFAR-10: accuracy without training
against multiply-accumulates and parameters, beside peers; accuracy after 200 steps of distillation from the dense
network; latency in eager torch and ONNX Runtime beside a thin network of equal cost; and what calibration costs.

Every run is written to the JSON file as soon as it ends; started again with the same file, the benchmark goes on where
it was, or prints the tables if nothing is left to do.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_runs import DATA, Place
from benchmarks.pool import Work, add_options, begin, run_all, show
from benchmarks.results import Results
from benchmarks.training_free_cost import cost_case, measure_cost
from benchmarks.training_free_nets import FULL, NETS, QUICK, Cell, images
from benchmarks.training_free_results import print_tables
from benchmarks.training_free_runs import (
    DENSE,
    Task,
    recover,
    run_dense,
    run_untrained,
    start,
    tasks_of,
    to_recover,
)
from benchmarks.training_free_runtime import BATCHES, RUNTIMES, compare, tasks_to_time, timed_case
from benchmarks.training_free_sides import OPERATORS, VARIANTS, missing_peers

USUAL_VARIANTS = [variant for variant in VARIANTS if variant != "random"]  # which without training is chance
COSTED = {True: ("spatial",), False: ("spatial", "channel", "tucker", "cp")}  # quick or not


def work_to_do(
    options: argparse.Namespace, cells: list[Cell], place: Place, results: Results, tasks: list[Task], parts: set[str]
) -> list[list[Work]]:
    """What is not in the results yet: dense networks, then runs without training, then recovery seed by seed."""
    dense: list[Work] = [(run_dense, (c, place)) for c in cells if not results.has(f"{DENSE}; {c.case}", DENSE)]
    if options.prepare:
        return [dense]
    untrained: list[Work] = []
    if "accuracy" in parts:
        untrained = [(run_untrained, (t, place)) for t in tasks if not results.has(t.case, t.side)]
    recovery: list[Work] = []
    if "recover" in parts:
        chosen = [task for cell in cells for task in to_recover(cell, options.only)]
        recovery = [
            (recover, (task, place, seed))
            for seed in range(options.seeds)
            for task in chosen
            if not results.has(task.recovery_case, task.side, seed)
        ]
    return [dense, untrained, recovery]


def time_all(
    options: argparse.Namespace, cells: list[Cell], place: Place, results: Results, tasks: list[Task], console: Console
) -> None:
    """Latency, in this process, when nothing else of the benchmark runs."""
    repeats, seconds = (15, 4.0) if options.quick else (30, 20.0)
    for cell in cells:
        if options.quick and cell.data != "fashion-mnist":
            continue
        for task in tasks_to_time(cell, tasks):
            if not all(results.has(timed_case(task, runtime, batch)) for runtime in RUNTIMES for batch in BATCHES):
                results.add(compare(task, place, repeats, seconds))
                console.print(f"latency; {cell.case}; {task.operator}, {task.where}: done")


def main() -> None:
    """Run from the command line."""
    options, parser = parse()
    missing = missing_peers()
    recipe = QUICK if options.quick else FULL
    results, console = begin("training_free", options, parser, recipe, missing)
    options.only = [name for name in OPERATORS if name in options.only and OPERATORS[name].peer not in missing]
    if options.cifar10 is None and "cifar10" in options.data:
        console.print("Left out: CIFAR-10, for want of --cifar10 FOLDER (benchmarks/README.md says of what)")
        options.data.remove("cifar10")
    place = Place(options.fashion_mnist, options.cifar10, options.work, options.accelerator)
    cells = [Cell(data, net, options.quick) for data in options.data for net in options.nets]
    tasks = [task for cell in cells for task in tasks_of(cell, options.only, options.variants)]
    parts = parts_of(options)

    groups = work_to_do(options, cells, place, results, tasks, parts)
    if any(groups):
        for data in options.data:
            images(data, place, None, False, 1)  # so that images are decoded once
        images.cache_clear()
        run_all(groups, results, options.jobs, partial(start, options.threads), console)
    if options.prepare:
        return
    start(1)
    if "latency" in parts:
        time_all(options, cells, place, results, tasks, console)
    if "calibration" in parts:
        for decomposition in COSTED[options.quick]:
            if decomposition in options.only and not results.has(cost_case(decomposition)):
                results.add(measure_cost(decomposition))
                console.print(f"{cost_case(decomposition)}: done")
    show(lambda console: print_tables(results, console), options.table)


def parts_of(options: argparse.Namespace) -> set[str]:
    """What is to be measured: everything but what is refused, or, where parts are asked for, those alone."""
    flags = {part: getattr(options, part) for part in ("recover", "latency", "calibration")}
    asked = {part for part, flag in flags.items() if flag}
    return asked or {"accuracy", *(part for part, flag in flags.items() if flag is None)}


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--quick", action="store_true", help="few samples and epochs of the dense networks: for a CPU")
    add("--seeds", type=int, default=3, help="of the recovery; here: %(default)s")
    add("--data", nargs="+", choices=list(DATA), default=list(DATA))
    add("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    add(
        "--only",
        nargs="+",
        choices=list(OPERATORS),
        default=list(OPERATORS),
        metavar="OPERATOR",
        help="of: %(choices)s",
    )
    add(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=USUAL_VARIANTS,
        metavar="VARIANT",
        help="of: %(choices)s",
    )
    add("--cifar10", type=Path, metavar="FOLDER", help="of train/<class>/ and test/<class>/")
    add_options(parser, Path("outputs/training_free"))
    add("--prepare", action="store_true", help="train the dense networks and do nothing else")
    for part, what in {
        "recover": "accuracy after a little training",
        "latency": "beside a thin network",
        "calibration": "what it costs in time and memory",
    }.items():
        add(f"--{part}", action=on_off, help=f"measure it only, or not at all: {what}")
    return parser.parse_args(), parser


if __name__ == "__main__":
    main()
