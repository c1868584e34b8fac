"""Int8 side by side: accuracy in the runtime, size of the file, and speed, beside peers and float in the same runtime.

    python benchmarks/quantization.py [--quick] [--seeds N] [--jobs N] [--json FILE] [--table FILE]

ResNet-20, VGG-small and MobileNetV2-small on Fashion-MNIST, as the training-free benchmark trains them: float, ours
after training and in training, and peers, each with the same calibration images; ResNet-18 for speed alone. Then the
small ResNet-8 with weights and values of few bits, and ResNet-20 pruned to half of its multiply-accumulates first.

Every run is written to the JSON file as soon as it ends; started again with the same file, the benchmark goes on where
it was, or prints the tables if nothing is left to do.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_runs import Place
from benchmarks.pool import Work, add_options, begin, run_all, show
from benchmarks.quantization_peers import PEERS, missing_peers
from benchmarks.quantization_results import print_tables
from benchmarks.quantization_runs import FLOAT, LOW_BITS, OURS, PRUNED, QUICK, SMALL, case_of, run, run_low_bits
from benchmarks.quantization_runtime import NETS, time_net, timed
from benchmarks.results import Results
from benchmarks.training_free_runs import start

ACCURACY_NETS = ("vgg_small", "resnet20", "mobilenetv2_small")


def work_to_do(options: argparse.Namespace, place: Place, results: Results, peers: list[str]) -> list[list[Work]]:
    """What is not in the results yet."""
    has = results.has
    runs: list[Work] = []
    for seed in range(options.seeds):
        for net in ACCURACY_NETS:
            sides = [
                *(FLOAT if seed == 0 else ()),
                *OURS,
                *peers,
                *([PRUNED] if net == "resnet20" and seed == 0 else []),
            ]
            runs += [(run, (side, net, place, QUICK, seed)) for side in sides if not has(case_of(net), side, seed)]
        case = f"low bits; fashion-mnist, {SMALL}"
        runs += [(run_low_bits, (n, place, QUICK, seed)) for n in LOW_BITS if not has(case, n, seed)]
    return [runs]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, and fewer repeats; networks are trained as shortly either way")
    add("--seeds", type=int, help="3; with --quick 1")
    add("--no-latency", action="store_true", help="accuracy alone: for a machine that is doing something else")
    add("--only-latency", action="store_true", help="speed alone")
    add_options(parser, Path("outputs/training_free"))
    options = parser.parse_args()
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.json = options.json or options.work / "quantization.json"
    missing = missing_peers()
    results, console = begin("quantization", options, parser, QUICK, missing)
    peers = [name for name, peer in PEERS.items() if not missing & set(peer.modules)]
    place = Place(options.fashion_mnist, None, options.work, options.accelerator)
    if not options.only_latency:
        run_all(
            work_to_do(options, place, results, peers), results, options.jobs, partial(start, options.threads), console
        )
    if not options.no_latency:
        start(options.threads)
        repeats = 10 if options.quick else 30
        for net in NETS:
            if not timed(results, net, peers):
                results.add(time_net(net, place, QUICK, peers, options.threads, repeats, 20.0))
                console.print(f"latency; {net}: done")
    show(lambda console: print_tables(results.rows, console), options.table)


if __name__ == "__main__":
    main()
