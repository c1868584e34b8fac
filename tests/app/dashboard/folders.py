"""Folders as jobs leave them, small or many."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from lightning_compress.artifact import save_compressed
from lightning_compress.edits import Keep, apply_edits
from lightning_compress.footprint import Footprint
from lightning_compress.latency import Latency, Spread
from lightning_compress.results import BudgetRow, LayerRow, Metric, Results

DENSE = {"lenet5": (537_000, 131_080, 0.91), "vgg_small": (2_380_000, 288_000, 0.99)}  # MACs, parameters, accuracy
METHODS = {"channel_pruning": 0.0, "low_rank": 0.01, "weight_sharing": -0.01}  # how much better than the others
BUDGETS = (0.7, 0.5, 0.25)

Json = dict[str, Any]


def footprint(macs: float, params: float) -> Footprint:
    def times(milliseconds: float, size: int) -> Latency:
        spread = Spread(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds)
        return Latency(spread, spread, size, 20, 1, 0.5, "cpu")

    latency = {1: times(macs / 1e6, 1), 32: times(macs / 1e5, 32)}
    return Footprint(round(params), round(params), round(macs), 4 * round(params), 9 * round(params), latency=latency)


def results(arch: str, method: str, budget: float | None, seed: int = 0) -> Json:
    """What the job of a sweep writes; with no budget nothing was compressed."""
    macs, params, accuracy = DENSE[arch]
    rest = 1.0 if budget is None else budget * (1 + 0.01 * seed)
    final = accuracy - 0.05 * (1 - rest) ** 2 + METHODS.get(method, 0) + 0.0001 * seed
    compressed = None if budget is None else footprint(rest * macs, rest * params)
    found = Results(
        dense=footprint(macs, params),
        compressed=compressed,
        metric=Metric("val/acc", accuracy, None if budget is None else final, "dense is as it was before the edits"),
        layers=() if budget is None else (LayerRow("conv1.weight", (20, 1, 5, 5), (10, 1, 5, 5), 32_000, 16_000),),
        frozen={"conv2.weight:0": "it reaches the output"},
        budgets=() if budget is None else (BudgetRow("ChannelPruning", "macs", budget, rest),),
        edits={} if budget is None else {method: 1},
        network="net",
        environment={"torch": "2.15.0", "seed": seed},
    )
    metrics = {"dense": {"test/acc": accuracy, "test/loss": 0.3}, "final": {"test/acc": final, "test/loss": 0.2}}
    overrides = [f"arch={arch}", f"method={method}"] + ([] if budget is None else [f"method.budget.macs={budget}"])
    config = {"seed": seed, "arch": {"_target_": f"zoo.{arch}"}, "method": {"budget": {"macs": budget}, "round_to": 8}}
    return {**found.to_json(), "metrics": metrics, "config": config, "config_digest": "0", "job": job(overrides)}


def job(overrides: list[str]) -> Json:
    choices = {**dict(part.split("=") for part in overrides), "data": "digits", "recipe": "single", "distill": "none"}
    return {
        "name": ",".join(overrides),
        "overrides": overrides,
        "choices": choices,
        "command": " ".join(["lightning-compress", *overrides]),
        "seconds": 12.5,
    }


def write(folder: Path, name: str, data: Json) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder


def sweep(root: Path) -> Path:
    """Eighteen compressed runs, one of which has everything, two dense, two failed, one at work and one damaged."""
    for arch in DENSE:
        write(root / f"arch={arch},method=none", "results.json", results(arch, "none", None))
        for method in METHODS:
            for budget in BUDGETS:
                found = results(arch, method, budget)
                write(root / f"{arch}-{method}-{budget}", "results.json", found)
    complete(root / "lenet5-channel_pruning-0.5")
    for number, error in enumerate(("ValueError: <b>no</b> </script> layer\nfits", "out of memory")):
        failed = {
            "config_digest": "0",
            "status": "failed",
            "error": error,
            "job": job([f"arch=alexnet{number}", "seed=1"]),
        }
        write(root / f"failed{number}", "job.json", failed)
    write(
        root / "running", "job.json", {"config_digest": "0", "status": "running", "error": None, "job": job(["seed=3"])}
    )
    write(root / "damaged", "results.json", {}).joinpath("results.json").write_text('{"format": 1, "dense": ')
    return root


def complete(folder: Path) -> None:
    """Give a run curves, of a resumed training, pictures and an artifact."""
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(1, 20, 5))
    slices = {"conv1.weight": {0: tuple(range(10))}, "conv1.bias": {0: tuple(range(10))}}
    apply_edits(net, [Keep(slices, {"conv1.weight": (20, 1, 5, 5), "conv1.bias": (20,)}, origin="channel_pruning")])
    save_compressed(net, folder / "compressed.safetensors")
    found = json.loads((folder / "results.json").read_text())
    write(folder, "results.json", {**found, "artifact": "compressed.safetensors"})
    for version, steps in enumerate(((0, 10, 20), (20, 30))):
        lines = [f"{step // 10},{step},{1 / (step + version + 1)},{0.5 + step / 100}" for step in steps]
        log = folder / "metrics" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text("\n".join(["epoch,step,train/loss,val/acc", *lines]))
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "pictures" / "filters.png")


def many(root: Path, count: int = 1000) -> Path:
    """As many runs as a large sweep has."""
    chance = random.Random(0)
    methods = [f"{method}_{kind}" for method in METHODS for kind in ("a", "b", "c")]
    for number in range(count):
        arch, method = chance.choice(list(DENSE)), chance.choice(methods)
        found = results(arch, method, round(chance.uniform(0.1, 0.9), 4), seed=number % 7)
        found["layers"] = [dict(found["layers"][0], tensor=f"layer{layer}.weight") for layer in range(20)]
        folder = write(root / f"run{number:04d}", "results.json", found)
        log = folder / "metrics" / "version_0" / "metrics.csv"
        log.parent.mkdir(parents=True)
        rows = (
            f"{step},{step},{chance.random():.6f},{chance.random():.6f},{chance.random():.6f}" for step in range(40)
        )
        log.write_text("\n".join(["epoch,step,train/loss,val/loss,val/acc", *rows]))
    return root
