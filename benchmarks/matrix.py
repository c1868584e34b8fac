"""The matrix: every scheme of compression on every type of network, measured.

    python benchmarks/matrix.py [--quick] [--data fashion-mnist] [--only NETWORK ...] [--schemes NAME ...] [--json FILE]

One feed-forward, one feed-back and two bi-directional networks are trained, once each; then each scheme compresses the
dense network while it is trained on. Accuracy is that of the classifier, on the whole test set and of the file that was
written; of networks that learn without labels it is a linear probe's, and their PSNR stands beside it. A cell that
cannot be filled says why. Written to the JSON file cell by cell: started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pool import show
from benchmarks.results import Found, Results, refusal
from benchmarks.training_free_nets import marked_table
from lightning_compress import (
    Budget,
    ChannelPruning,
    CompactFilters,
    Distillation,
    LowRankFactorization,
    Quantization,
    WeightPruning,
    WeightSharing,
    load_compressed,
    measure,
    save_compressed,
)
from lightning_compress.files import open_atomic
from lightning_compress.zoo import (
    ContrastiveDivergence,
    ConvolutionalDBN,
    DeconvolutionalNetwork,
    Digits,
    FashionMNIST,
    ImageClassifier,
    ImageDataModule,
    ImageReconstruction,
    StackedConvAutoencoder,
    VGGSmall,
)

CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """How networks are trained.

    Attributes:
        data: "digits" or "fashion-mnist".
        dense_epochs: of the dense network.
        epochs: that each scheme has after it.
        batch_size: of both.
        size: sides of the images.
        limit: training samples; None: all.
    """

    data: str
    dense_epochs: int
    epochs: int
    batch_size: int
    size: int
    limit: int | None = None


RECIPES = {"digits": Recipe("digits", 20, 8, 32, 8), "fashion-mnist": Recipe("fashion-mnist", 15, 8, 64, 28)}
QUICK = {
    "digits": Recipe("digits", 6, 3, 32, 8),
    "fashion-mnist": Recipe("fashion-mnist", 2, 1, 64, 28, limit=3000),
}


@dataclass(frozen=True)
class Network:
    """A network of the matrix.

    Attributes:
        title: for the table.
        build: makes it for images of a size and a factor on its channels.
        task: its LightningModule, with a learning rate for dense training, or for what comes after.
        read: the layer that the linear probe reads, if there is one. Pruning leaves it its channels: the layers learn
            without labels, and what the probe has no features for cannot be made up for by any of them.
    """

    title: str
    build: Callable[[int, float], nn.Module]
    task: Callable[[nn.Module, bool], L.LightningModule]
    read: str | None = None


def _classify(net: nn.Module, dense: bool) -> L.LightningModule:
    return ImageClassifier(net, CLASSES, lr=0.1 if dense else 0.05)


def _reconstruct(net: nn.Module, dense: bool) -> L.LightningModule:
    return ImageReconstruction(net, CLASSES, lr=5e-3 if dense else 2e-3)


def _contrast(net: nn.Module, dense: bool) -> L.LightningModule:
    return ContrastiveDivergence(net, CLASSES, lr=5e-3 if dense else 2e-3)


NETWORKS = {
    "feed-forward": Network("feed-forward: VGG-small", lambda _, width: VGGSmall(1, CLASSES, width=width), _classify),
    "feed-back": Network(
        "feed-back: deconvolutional network",
        lambda size, width: DeconvolutionalNetwork(1, CLASSES, size, width=width),
        _reconstruct,
        read="layers.1.filters",
    ),
    "bi-directional": Network(
        "bi-directional: convolutional autoencoder",
        lambda size, width: StackedConvAutoencoder(1, CLASSES, size, width=width),
        _reconstruct,
        read="layers.1.filters",
    ),
    "belief": Network(
        "bi-directional: convolutional belief network",
        lambda size, width: ConvolutionalDBN(1, CLASSES, size, width=width),
        _contrast,
        read="layers.1.filters",
    ),
}

THIN = 0.5
SCHEMES: dict[str, Callable[[Network, nn.Module], list[L.Callback]]] = {
    "channel pruning": lambda net, _: [ChannelPruning(Budget(macs=0.5), exclude=[net.read] if net.read else [])],
    "weight pruning": lambda *_: [WeightPruning(0.8)],
    "weight sharing": lambda *_: [WeightSharing(4)],
    "quantization": lambda *_: [Quantization()],
    "low rank": lambda *_: [LowRankFactorization(Budget(macs=0.6), round_to=1)],
    "compact filters": lambda *_: [CompactFilters("ghost", Budget(params=0.7))],
    "distillation": lambda _, dense: [Distillation(dense)],
}
"""Name -> callbacks, given what they are for and the dense network. A distilled one is half as wide, from scratch."""


def images(recipe: Recipe, folder: Path) -> ImageDataModule:
    """The data of a recipe."""
    kind = Digits if recipe.data == "digits" else FashionMNIST
    return kind(folder, batch_size=recipe.batch_size, limit_train=recipe.limit)


def fit(module: L.LightningModule, epochs: int, data: ImageDataModule, callbacks: list[L.Callback]) -> None:
    """Train, in silence."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=callbacks, enable_checkpointing=False, **quiet
    )
    trainer.fit(module, data)


def judge(network: Network, net: nn.Module, file: Path, recipe: Recipe, folder: Path, width: float) -> dict[str, Any]:
    """Write a network, read it back, and measure what was read."""
    save_compressed(net, file)
    read = load_compressed(file, network.build(recipe.size, width)).eval()
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    [found] = trainer.test(network.task(read, False), images(recipe, folder), verbose=False)
    cost = measure(read, torch.zeros(1, 1, recipe.size, recipe.size))
    metrics = {"accuracy": found["test/acc"], "macs": cost.macs, "params": cost.params, "bytes": file.stat().st_size}
    return {**metrics, **({"psnr": found["test/psnr"]} if "test/psnr" in found else {})}


def dense_network(name: str, recipe: Recipe, folder: Path, work: Path) -> nn.Module:
    """Trained once for each recipe."""
    network = NETWORKS[name]
    own = "-".join(map(str, asdict(recipe).values()))
    path = work / f"{name}-{own}.pt"
    L.seed_everything(0, workers=True, verbose=False)
    net = network.build(recipe.size, 1.0)
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(network.task(net, True), recipe.dense_epochs, images(recipe, folder), [])
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            torch.save(net.state_dict(), file)
    return net


def cell(name: str, scheme: str, recipe: Recipe, folder: Path, work: Path) -> Found:
    """A scheme on a network; "dense" is none."""
    network, dense = NETWORKS[name], dense_network(name, recipe, folder, work)
    data, began = images(recipe, folder), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "net.safetensors"
        if scheme == "dense":
            return Found(name, scheme, judge(network, dense, file, recipe, folder, 1.0))
        L.seed_everything(0, workers=True, verbose=False)
        taught = scheme == "distillation"
        width, epochs = (THIN, recipe.dense_epochs) if taught else (1.0, recipe.epochs)
        net = network.build(recipe.size, width) if taught else copy.deepcopy(dense)
        try:
            fit(network.task(net.train(), taught), epochs, data, SCHEMES[scheme](network, dense))
        except (ValueError, MisconfigurationException) as error:  # what a user would be told
            return Found(name, scheme, refusal(error))
        found = judge(network, net, file, recipe, folder, width)
    return Found(name, scheme, {**found, "seconds": time.perf_counter() - began})


def print_table(results: Results, console: Console) -> None:
    """One row for each cell, in fractions of the dense network."""
    table = marked_table("network", "scheme", "accuracy, %", "− dense", "PSNR, dB", "MACs", "file", left=2)
    for name, network in NETWORKS.items():
        rows = results.rows.get(name, {})
        dense = rows.get("dense")
        for scheme in ("dense", *SCHEMES):
            metrics = rows.get(scheme)
            if metrics is None or dense is None:
                continue
            if "refused" in metrics:
                table.add_row(network.title, scheme, "refused", "", "", "", metrics["refused"])
                continue
            first = scheme == "dense"
            table.add_row(
                network.title,
                scheme,
                f"{100 * metrics['accuracy']:.2f}",
                "" if first else f"{100 * (metrics['accuracy'] - dense['accuracy']):+.2f}",
                f"{metrics['psnr']:.1f}" if "psnr" in metrics else "",
                f"{metrics['macs']:,}" if first else f"{metrics['macs'] / dense['macs']:.2f}",
                f"{metrics['bytes']:,} B" if first else f"{metrics['bytes'] / dense['bytes']:.2f}",
            )
    console.print(table)
    console.print(
        "\nAccuracy of the classifier, a linear probe but for the feed-forward network, on the whole test set, read "
        "from the file; MACs and bytes as fractions of the dense network's."
    )


def main() -> None:
    """Fill the cells that are not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few epochs")
    add("--data", choices=RECIPES, default="digits")
    add("--fashion-mnist", type=Path, default=Path("data"), metavar="FOLDER", help="of its four files")
    add("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="NAME", help=", ".join(SCHEMES))
    add("--work", type=Path, default=Path("outputs/matrix"), metavar="FOLDER", help="for dense networks")
    add("--json", type=Path, metavar="FILE", help="results; WORK/DATA.json or WORK/DATA-quick.json")
    add("--table", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    arguments = parser.parse_args()
    recipe = (QUICK if arguments.quick else RECIPES)[arguments.data]
    path = arguments.json or arguments.work / f"{recipe.data}{'-quick' * arguments.quick}.json"
    results = Results("matrix", path, {**asdict(recipe), "thin": THIN})
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    for name in arguments.only:
        for scheme in ("dense", *arguments.schemes):
            if not results.has(name, scheme):
                print(f"{name}, {scheme}", file=sys.stderr, flush=True)
                results.add([cell(name, scheme, recipe, arguments.fashion_mnist, arguments.work)])
    show(lambda console: print_table(results, console), arguments.table)


if __name__ == "__main__":
    main()
