"""Channel pruning to a budget, beside Torch-Pruning and fasterai: the same dense networks, budgets, epochs and seeds.

    python benchmarks/pruning.py [--quick] [--seeds N] [--jobs N] [--json FILE] [--table FILE]

A ResNet is trained on Fashion-MNIST, once for each seed. Each side then has as many epochs to bring it to a half and to
a quarter of its multiply-accumulates; what counts is the accuracy on the whole test set after the last one, beside that
of the dense network trained on for as long. `pruning_sides.py` holds the sides, `pruning_runs.py` the recipe.

Every run is written to the JSON file as soon as it ends; started again with the same file, the benchmark goes on where
it was, or prints the table if nothing is left to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_results import difference
from benchmarks.distillation_runs import Place, start_worker
from benchmarks.pool import Work, add_options, begin, run_all, show
from benchmarks.pruning_runs import BUDGETS, FULL, QUICK, Recipe, Task, case_of, run, train_dense
from benchmarks.pruning_sides import DENSE, PEERS, SIDES, USUAL, missing_peers
from benchmarks.results import Results, mean_of
from benchmarks.training_free_nets import images, marked_table


def work_to_do(sides: list[str], seeds: int, recipe: Recipe, place: Place, results: Results) -> list[list[Work]]:
    """What is not in the results yet: the dense networks, then one seed of all sides after the other."""
    dense: list[Work] = [
        (train_dense, (recipe, place, seed)) for seed in range(seeds) if not results.has("dense", "dense", seed)
    ]
    tasks = [
        Task(side, budget, seed)
        for seed in range(seeds)
        for side in sides
        for budget in ((None,) if side == DENSE else BUDGETS)
        if not results.has(case_of(budget), side, seed)
    ]
    return [dense, [(run, (task, recipe, place)) for task in tasks]]


def print_table(results: Results, recipe: Recipe, console: Console) -> None:
    """Each side at each budget, beside the dense network that was trained on."""
    dense = results.rows.get("dense", {})
    if "dense" not in dense:
        return
    before = by_seed(dense["dense"])
    trained_on = by_seed(dense.get(DENSE, {}))
    samples = "all training images" if recipe.samples is None else f"{recipe.samples:,} training images"
    console.print(
        f"**ResNet-{recipe.depth}, Fashion-MNIST**, {samples}{', shifted and mirrored' if recipe.augment else ''}. "
        f"Dense: {mean_of(list(before.values()))} after {recipe.dense_epochs} epochs"
        + (f", {mean_of(list(trained_on.values()))} after {recipe.epochs} more." if trained_on else ".")
    )
    table = marked_table(
        "budget", "side", "seeds", "accuracy", "− dense", "− dense, trained on", "MACs", "params", "CPU s", left=2
    )
    for budget in BUDGETS:
        for side in SIDES:
            metrics = results.rows.get(case_of(budget), {}).get(side)
            if metrics is None:
                continue
            own = by_seed(metrics)
            table.add_row(
                case_of(budget),
                side,
                str(len(own)),
                mean_of(list(own.values())),
                difference(own, before),
                difference(own, trained_on),
                *(f"{statistics.mean(metrics[f'{unit}_fraction']):.3f}" for unit in ("macs", "params")),
                f"{statistics.median(metrics['cpu_seconds']):.0f}",
            )
    console.print(table)
    console.print(
        f"Top-1 on the whole test set after the last of {recipe.epochs} epochs, mean ± standard deviation over the "
        "seeds, in %. Differences seed by seed, in points, ± the standard error of their mean; (noise): below two of "
        "them. MACs, params: fractions of the dense network's. CPU s: processor time of one run, median."
    )


def by_seed(metrics: dict[str, Any]) -> dict[int, float]:
    """Seed -> accuracy."""
    return dict(zip(metrics.get("seed", ()), metrics.get("accuracy", ()), strict=True))


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a ResNet-8 and few epochs: for a CPU")
    add("--seeds", type=int, default=3, help="here: %(default)s")
    add("--only", nargs="+", choices=SIDES, default=list(USUAL), metavar="SIDE", help="of: %(choices)s")
    add_options(parser, Path("outputs/pruning"))
    return parser.parse_args(), parser


def main() -> None:
    """Run from the command line."""
    options, parser = parse()
    missing = missing_peers()
    sides = [s for s in SIDES if s in options.only and not (s in PEERS and PEERS[s].package in missing)]
    recipe = QUICK if options.quick else FULL
    results, console = begin("pruning", options, parser, recipe, missing)
    place = Place(options.fashion_mnist, None, options.work, options.accelerator)
    groups = work_to_do(sides, options.seeds, recipe, place, results)
    if any(groups):
        images("fashion-mnist", place, recipe.samples, recipe.augment, recipe.batch_size)  # is it there?
        run_all(groups, results, options.jobs, partial(start_worker, options.threads), console)
    show(lambda console: print_table(results, recipe, console), options.table)


if __name__ == "__main__":
    main()
