from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_runs import Place, start_worker
from benchmarks.training_free_nets import Cell, train_dense


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outputs/training_free"))
    parser.add_argument("--jobs", type=int, default=2)
    o = parser.parse_args()
    place = Place(Path("data"), o.cifar10, o.work, "cpu")
    order = [("fashion-mnist", "vgg_small"), ("fashion-mnist", "resnet20"), ("fashion-mnist", "mobilenetv2_small"),
             ("cifar10", "mobilenetv2_small"), ("cifar10", "resnet20"), ("cifar10", "vgg_small")]
    with ProcessPoolExecutor(o.jobs, multiprocessing.get_context("spawn"), start_worker, (1,)) as pool:
        fs = {pool.submit(train_dense, Cell(d, n, o.quick), place): (d, n) for d, n in order}
        for f in as_completed(fs):
            r = f.result()
            print(fs[f], f"{r.accuracy:.2%}", f"{r.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
