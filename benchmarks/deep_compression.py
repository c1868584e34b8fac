"""What each stage of Deep Compression gives: pruned, shared, coded; accuracy and bytes of the file, from the file.

    python benchmarks/deep_compression.py [--seeds N] [--jobs N] [--json FILE] [--table FILE]

Runs `lightning-compress experiment=deep_compression_lenet5 data=fashion_mnist` and that of LeNet-300-100, for some
seeds, with a callback beside the others that looks at the network after each epoch and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation_results import difference
from benchmarks.distillation_runs import start_worker
from benchmarks.pool import Work, console_for, run_all, show
from benchmarks.results import Found, Results, mean_of
from benchmarks.training_free_nets import marked_table
from lightning_compress import load_compressed
from lightning_compress.app.build import make_net
from lightning_compress.app.jobs import write_json
from lightning_compress.app.work import run
from lightning_compress.artifact import artifact_bytes
from lightning_compress.quiet import without_observers

EXPERIMENTS = {"deep_compression_lenet5": "LeNet-5", "deep_compression_lenet300": "LeNet-300-100"}
FIRST_SEED = 42  # the command line's own
STAGES = {"dense_": "dense, float32", "pruned_": "pruned", "shared_": "shared", "": "shared, trained"}


class Stages(L.Callback):
    """Accuracy on the test set and bytes of the file: before weights are shared, when they just are, at the end.

    Args:
        path: JSON file that the figures go to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on has figures already."""
        if trainer.ckpt_path and self.path.is_file():
            self.found = json.loads(self.path.read_text())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last one before the sharing counts."""
        if "shared_bytes" not in self.found:
            self._look("pruned", trainer, pl_module)

    def after_edits(self, trainer: L.Trainer, pl_module: L.LightningModule, path: str, edits: Any, *_: Any) -> None:
        """See `CompressionCallback`."""
        if any(getattr(edit, "role", None) == "code" for edit in edits):
            self._look("shared", trainer, pl_module)

    @torch.no_grad()
    def _look(self, stage: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net, training = pl_module.net, pl_module.training
        assert isinstance(net, nn.Module)
        net.eval()
        with torch.random.fork_rng(devices=[]), without_observers(net):  # the run is to go on as if nothing had been
            data = trainer.datamodule  # type: ignore[attr-defined]
            data.setup("test")
            batches = list(data.test_dataloader())
            right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
        net.train(training)
        self.found |= {
            f"{stage}_accuracy": right / sum(len(y) for _, y in batches),
            f"{stage}_bytes": float(artifact_bytes(net)),
        }
        write_json(self.path, self.found)


def composed(experiment: str, *overrides: str) -> DictConfig:
    """The configuration of an experiment."""
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return compose("train", [f"experiment={experiment}", "data=fashion_mnist", *overrides])


def recipe_of(experiment: str) -> dict[str, Any]:
    """What its results depend on."""
    config = composed(experiment)
    found = OmegaConf.to_container(config, resolve=False)
    assert isinstance(found, dict)
    return {name: found[name] for name in ("recipe", "task", "dense")} | {"epochs": config.trainer.max_epochs}


def run_experiment(experiment: str, seed: int, work: Path, fashion_mnist: Path) -> Found:
    """One job of the command line, and what its stages gave."""
    folder = work / f"{experiment}-{seed}"
    stages = folder / "stages.json"
    config = composed(
        experiment,
        f"data.root={fashion_mnist}",
        f"seed={seed}",
        f"output_dir={work}",
        "logger=none",
        "report.latency=false",
        "report.table=false",
        "trainer.enable_progress_bar=false",
        "+recipe.stages._target_=benchmarks.deep_compression.Stages",
        f"+recipe.stages.path={stages}",
    )
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = run(config, folder)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    artifact = folder / "compressed.safetensors"
    net = make_net(config)
    start = time.perf_counter()
    load_compressed(artifact, net)
    found = {
        "dense_accuracy": metrics["dense"]["test/acc"],
        "dense_bytes": artifact_bytes(make_net(config)),
        **json.loads(stages.read_text()),
        "accuracy": metrics["final"]["test/acc"],
        "bytes": artifact.stat().st_size,
        "decode_seconds": time.perf_counter() - start,
        **seconds,
    }
    return Found(EXPERIMENTS[experiment], "ours", found, seed)


def print_table(results: Results, console: Console) -> None:
    """A row for each stage."""
    table = marked_table(
        "network", "stage", "seeds", "accuracy", "− dense", "bytes of the file", "times smaller", left=2
    )
    for title in EXPERIMENTS.values():
        metrics = results.rows.get(title, {}).get("ours")
        if metrics is None:
            continue
        dense = dict(zip(metrics["seed"], metrics["dense_accuracy"], strict=True))
        for prefix, stage in STAGES.items():
            own = dict(zip(metrics["seed"], metrics[f"{prefix}accuracy"], strict=True))
            sizes = metrics[f"{prefix}bytes"]
            smaller = [before / after for before, after in zip(metrics["dense_bytes"], sizes, strict=True)]
            table.add_row(
                title,
                stage,
                str(len(own)),
                mean_of(list(own.values())),
                "" if prefix == "dense_" else difference(own, dense),
                f"{statistics.mean(sizes):,.0f}",
                "" if prefix == "dense_" else f"{min(smaller):.1f} to {max(smaller):.1f}",
            )
    console.print(table)
    console.print(
        "Top-1 on the whole test set of Fashion-MNIST, mean ± standard deviation over the seeds, in %; differences are "
        "seed by seed, in points, ± the standard error of their mean. Bytes of the file, coded. Pruned: in the last "
        "epoch before weights are shared. Shared: before these values are trained. The last row is that of the file."
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar="EXPERIMENT")
    add("--seeds", type=int, default=3, help="here: %(default)s")
    add("--fashion-mnist", type=Path, default=Path("data"), metavar="FOLDER", help="of its four files")
    add("--work", type=Path, default=Path("outputs/deep_compression"), metavar="FOLDER", help="for the jobs")
    add("--json", type=Path, metavar="FILE", help="results; WORK/results.json")
    add("--table", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    add("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes side by side; here: %(default)s")
    options = parser.parse_args()
    console = console_for()
    recipes = {experiment: recipe_of(experiment) for experiment in EXPERIMENTS}
    try:
        results = Results("deep_compression", options.json or options.work / "results.json", recipes)
    except ValueError as error:
        parser.error(str(error))
    runs: list[Work] = [
        (run_experiment, (experiment, seed, options.work.absolute(), options.fashion_mnist))
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
        for experiment in options.only
        if not results.has(EXPERIMENTS[experiment], "ours", seed)
    ]
    run_all([runs], results, options.jobs, partial(start_worker, 1), console)
    show(lambda console: print_table(results, console), options.table)


if __name__ == "__main__":
    main()
