"""One run of the quantization benchmark: a network quantized on one side, with one seed, and tested in its runtime."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from torch import Tensor, nn

from benchmarks.distillation_runs import Place
from benchmarks.distillation_sides import KD_TASK, KD_TEMPERATURE, KD_WEIGHT
from benchmarks.quantization_peers import PEERS, Peer
from benchmarks.results import Found, refusal
from benchmarks.training_free_nets import CLASSES, Cell, images, train_dense, trainer
from benchmarks.training_free_runs import REFUSALS
from lightning_compress import Budget, ChannelPruning, Distillation, Quantization, export, save_compressed
from lightning_compress.artifact import artifact_bytes
from lightning_compress.calls import as_calls
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD
from lightning_compress.edits import apply_edits
from lightning_compress.files import open_atomic
from lightning_compress.methods.posttraining import Precision, prepare
from lightning_compress.runtimes import OnnxNetwork, count_integers
from lightning_compress.zoo.feedforward import ResNet
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = [
    "EAGER",
    "FLOAT",
    "LOW_BITS",
    "OURS",
    "PRUNED",
    "QUICK",
    "RUNTIME",
    "SMALL",
    "Recipe",
    "case_of",
    "run",
    "run_low_bits",
]

DATA = "fashion-mnist"
EAGER, RUNTIME, FLOAT = "float, eager", "float, ONNX Runtime", ("float, eager", "float, ONNX Runtime")
OURS = ("ours, after training", "ours, in training")
PRUNED = "ours, half of the MACs, in training"
SMALL = "resnet-8"
LOW_BITS = {"W4A8": (4, 8), "W2A8": (2, 8)}
TEST_BATCH = 250


@dataclass(frozen=True)
class Recipe:
    """What is done to the networks.

    Attributes:
        calibration: unlabelled training images, drawn by the seed.
        batch: of these, as peers get them.
        steps: of training with quantization, from the trained network.
        lr: highest learning rate of these.
        batch_size: of these.
        prune_epochs: of pruning and quantization, from the trained network.
        small_epochs: of the small network's training; it is trained with few bits for half as many, by itself.
        small_lr: highest learning rate of both.
        small_width: of the small network.
    """

    calibration: int = 256
    batch: int = 32
    steps: int = 200
    lr: float = 0.02
    batch_size: int = 64
    prune_epochs: int = 3
    small_epochs: int = 4
    small_lr: float = 0.1
    small_width: float = 0.5


QUICK = Recipe()


@dataclass
class Side:
    """A network in its runtime.

    Attributes:
        predict: logits of a batch of images.
        bytes: what one would deploy; None: there is no file.
        metrics: anything else.
    """

    predict: Callable[[Tensor], Any]
    bytes: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def case_of(net: str) -> str:
    """Of the JSON file."""
    return f"accuracy; {DATA}, {net}"


@cache
def _test_batches(place: Place) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(images(DATA, place, None, False, TEST_BATCH).test_dataloader())


def accuracy(predict: Callable[[Tensor], Any], place: Place) -> float:
    """Top-1 on all 10,000 test images, between 0 and 1."""
    with torch.no_grad():
        right = sum(int((predict(x).argmax(1) == y).sum()) for x, y in _test_batches(place))
    return right / sum(len(y) for _, y in _test_batches(place))


def calibration(place: Place, samples: int | None, count: int, seed: int) -> Tensor:
    """Training images without labels: [count, 1, 28, 28]."""
    data = images(DATA, place, samples, False, 64)
    torch.manual_seed(seed)
    return torch.cat([x for x, _ in islice(data.train_dataloader(), -(-count // 64))])[:count].contiguous()


def dense_of(net: str, place: Place, recipe: Recipe, seed: int) -> nn.Module:
    """The trained network; of the small one there is one for each seed."""
    if net != SMALL:
        dense = train_dense(Cell(DATA, net, True), place).net
        return copy.deepcopy(dense).to(memory_format=torch.contiguous_format).eval()
    return _small(place, recipe, seed)


def _small(place: Place, recipe: Recipe, seed: int) -> nn.Module:
    path = place.work / f"{SMALL}-{recipe.small_width}-{recipe.small_epochs}-{seed}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    net = ResNet(8, 1, CLASSES, width=recipe.small_width, shortcut="A")
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            L.seed_everything(seed, workers=True, verbose=False)
            net = ResNet(8, 1, CLASSES, width=recipe.small_width, shortcut="A")
            data = images(DATA, place, None, False, 128)
            trainer(max_epochs=recipe.small_epochs, accelerator=place.accelerator).fit(
                ImageClassifier(net, CLASSES, lr=recipe.small_lr), data
            )
            with open_atomic(path) as file:
                torch.save(net.cpu().state_dict(), file)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def teaching() -> Distillation:
    """The network as it was teaches."""
    return Distillation(
        "self", {"kd": Term(KD(temperature=KD_TEMPERATURE), KD_WEIGHT)}, task_weight=KD_TASK, metrics=False
    )


def train_quantized(
    net: nn.Module,
    place: Place,
    recipe: Recipe,
    seed: int,
    samples: int | None,
    callbacks: list[L.Callback],
    **limits: int,
) -> nn.Module:
    """Train with some callbacks; the network afterwards."""
    data = images(DATA, place, samples, False, recipe.batch_size)
    L.seed_everything(seed, workers=True, verbose=False)
    net = net.train()
    trainer(accelerator=place.accelerator, callbacks=callbacks, **limits).fit(
        ImageClassifier(net, CLASSES, lr=recipe.lr), data
    )
    return net.cpu().eval()


def quantized(net: nn.Module, x: Tensor, **precision: Any) -> nn.Module:
    """Quantized after training."""
    prepared = prepare(net, as_calls(x), Precision(**precision))
    net = copy.deepcopy(net)
    apply_edits(net, [prepared.edit])
    prepared.apply(net)
    return net


def exported(net: nn.Module, x: Tensor, folder: Path, threads: int = 1) -> Side:
    """In ONNX Runtime."""
    path = folder / "ours.onnx"
    parity = export(net, path, x[:64])
    save_compressed(net, folder / "net.safetensors")
    integers = count_integers(path)
    metrics = {
        "layers_int8": integers.layers,
        "layers": integers.of,
        "islands": sum(integers.islands.values()),
        "artifact_bytes": (folder / "net.safetensors").stat().st_size,
        "agreement": parity.agreement,
    }
    return Side(OnnxNetwork(path, threads), path.stat().st_size, metrics)


def make_side(side: str, net: str, place: Place, recipe: Recipe, seed: int, folder: Path) -> Side:
    """A network on one side."""
    dense = dense_of(net, place, recipe, seed)
    samples = Cell(DATA, net, True).recipe.samples
    x = calibration(place, samples, recipe.calibration, seed)
    if side == EAGER:
        return Side(dense, artifact_bytes(dense))
    if side == RUNTIME:
        return exported(dense, x, folder)
    start = time.process_time()
    if side == OURS[0]:
        found = exported(quantized(dense, x), x, folder)
    elif side == OURS[1]:
        callbacks = [teaching(), Quantization(start=0)]
        done = train_quantized(dense, place, recipe, seed, samples, callbacks, max_steps=recipe.steps)
        found = exported(done, x, folder)
        found.metrics["in_torch"] = accuracy(done, place)
    elif side == PRUNED:
        pruning = ChannelPruning(Budget(macs=0.5), start=0, end=0, steps=1, round_to=4)
        callbacks = [teaching(), pruning, Quantization(start=1)]
        done = train_quantized(dense, place, recipe, seed, samples, callbacks, max_epochs=recipe.prune_epochs)
        found = exported(done, x, folder)
        found.metrics["in_torch"] = accuracy(done, place)
    else:
        peer = PEERS[side].make(dense, list(x.split(recipe.batch)), folder)
        found = Side(peer.predict, peer.bytes, _operators(peer))
    found.metrics["cpu_seconds"] = time.process_time() - start
    return found


def _operators(peer: Peer) -> dict[str, Any]:
    if peer.path is None or peer.path.suffix != ".onnx":
        return {}
    integers = count_integers(peer.path)
    return {"layers_int8": integers.layers, "layers": integers.of, "islands": sum(integers.islands.values())}


def run(side: str, net: str, place: Place, recipe: Recipe, seed: int) -> Found:
    """Quantize, and test in the runtime."""
    try:
        return Found(case_of(net), side, _tested(side, net, place, recipe, seed), seed)
    except REFUSALS as error:
        return Found(case_of(net), side, refusal(error), seed)


def _tested(side: str, net: str, place: Place, recipe: Recipe, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        made = make_side(side, net, place, recipe, seed, Path(folder))
        metrics = {"accuracy": accuracy(made.predict, place), **made.metrics}
        if made.bytes is not None:
            metrics["bytes"] = made.bytes
    return metrics


def run_low_bits(name: str, place: Place, recipe: Recipe, seed: int) -> Found:
    """The small network with few bits: after training, and trained with them."""
    bits, value_bits = LOW_BITS[name]
    dense = dense_of(SMALL, place, recipe, seed)
    x = calibration(place, None, recipe.calibration, seed)
    metrics: dict[str, Any] = {"float": accuracy(dense, place), "float_bytes": artifact_bytes(dense)}
    with tempfile.TemporaryDirectory() as folder:
        after = exported(quantized(dense, x, bits=bits, value_bits=value_bits), x, Path(folder))
        metrics |= {"after_training": accuracy(after.predict, place)}
        callbacks, epochs = [Quantization(bits, value_bits, start=0)], max(1, recipe.small_epochs // 2)
        own = replace(recipe, lr=recipe.small_lr)
        done = train_quantized(dense, place, own, seed, None, callbacks, max_epochs=epochs)
        made = exported(done, x, Path(folder))
        metrics |= {"accuracy": accuracy(made.predict, place), "in_torch": accuracy(done, place)}
        metrics |= {"bytes": made.metrics["artifact_bytes"], "onnx_bytes": made.bytes}
    return Found(f"low bits; {DATA}, {SMALL}", name, metrics, seed)
