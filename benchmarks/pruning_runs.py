"""One run of the channel pruning benchmark: a dense network trained once, or pruned on one side with one seed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from torch import Tensor, nn

from benchmarks.distillation_runs import Place
from benchmarks.pruning_sides import DENSE, OURS, PEERS, THIN, Learner, prune_to
from benchmarks.results import Found
from benchmarks.training_free_nets import CLASSES, accuracy, channels_last, images, trainer, widest
from lightning_compress import measure
from lightning_compress.files import open_atomic
from lightning_compress.zoo.feedforward import ResNet
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = ["BUDGETS", "FULL", "QUICK", "Recipe", "Task", "case_of", "dense_network", "run", "train_dense"]

BUDGETS = (0.5, 0.25)
DATA = "fashion-mnist"


@dataclass(frozen=True)
class Recipe:
    """How networks are trained.

    Attributes:
        depth: of the ResNet.
        dense_epochs: of the dense network, from scratch.
        epochs: that each side has after it.
        learning: share of these in which peers that regularise do so; then they prune.
        dense_lr: highest learning rate of the dense training.
        lr: of the epochs after it.
        batch_size: of both.
        samples: training samples; None: all.
        augment: shift and mirror the images.
    """

    depth: int
    dense_epochs: int
    epochs: int
    augment: bool
    learning: float = 1 / 3
    dense_lr: float = 0.1
    lr: float = 0.05
    batch_size: int = 128
    samples: int | None = None


QUICK = Recipe(depth=8, dense_epochs=8, epochs=4, augment=False)
FULL = Recipe(depth=20, dense_epochs=60, epochs=60, augment=True)


@dataclass(frozen=True)
class Task:
    """A run.

    Attributes:
        side: a name in `pruning_sides.SIDES`.
        budget: fraction of the multiply-accumulates; None: of the dense network that is trained on.
        seed: of the dense network, and of what is done to it.
    """

    side: str
    budget: float | None
    seed: int


def case_of(budget: float | None) -> str:
    """Of the JSON file."""
    return "dense" if budget is None else f"MACs {budget:g}"


def _net(recipe: Recipe, width: float = 1.0) -> nn.Module:
    return channels_last(ResNet(recipe.depth, 1, CLASSES, width=width, shortcut="B"))


@cache
def _dense(recipe: Recipe, place: Place, seed: int) -> tuple[Mapping[str, Tensor], float]:
    own = (recipe.depth, recipe.dense_epochs, recipe.augment, recipe.dense_lr, recipe.batch_size, recipe.samples, seed)
    path = place.work / f"resnet-{'-'.join(map(str, own))}.pt"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            L.seed_everything(seed, workers=True, verbose=False)
            net = _net(recipe)
            _fit(net, recipe, place, recipe.dense_epochs, recipe.dense_lr)
            with open_atomic(path) as file:
                torch.save({"state_dict": net.state_dict(), "accuracy": accuracy(net, DATA, place)}, file)
        found = torch.load(path, weights_only=True)
        return found["state_dict"], found["accuracy"]


def dense_network(recipe: Recipe, place: Place, seed: int) -> nn.Module:
    """The dense network of a seed, trained or read."""
    net = _net(recipe)
    net.load_state_dict(_dense(recipe, place, seed)[0])
    return net


def train_dense(recipe: Recipe, place: Place, seed: int) -> Found:
    """Train the dense network of a seed, or read it."""
    reached = _dense(recipe, place, seed)[1]
    return Found("dense", "dense", {"accuracy": reached, "epochs": recipe.dense_epochs}, seed)


def _fit(
    net: nn.Module, recipe: Recipe, place: Place, epochs: int, lr: float, callbacks: list[L.Callback] | None = None
) -> None:
    data = images(DATA, place, recipe.samples, recipe.augment, recipe.batch_size)
    training = trainer(max_epochs=epochs, accelerator=place.accelerator, callbacks=callbacks or [])
    training.fit(ImageClassifier(net.train(), CLASSES, lr=lr), data)
    net.cpu()


def run(task: Task, recipe: Recipe, place: Place) -> Found:
    """Prune and train on one side; what is found is the network after the last epoch."""
    net = dense_network(recipe, place, task.seed)
    data = images(DATA, place, recipe.samples, recipe.augment, recipe.batch_size)
    image = data.train_dataloader().dataset[0][0][None].contiguous(memory_format=torch.channels_last)
    before = measure(net.eval(), image)
    fit = partial(_fit, recipe=recipe, place=place)
    L.seed_everything(task.seed, workers=True, verbose=False)
    wall, cpu = time.perf_counter(), time.process_time()
    if task.side == DENSE:
        fit(net, epochs=recipe.epochs, lr=recipe.lr)
    elif task.budget is None:
        raise ValueError(f"{task.side} needs a budget")
    elif task.side == THIN:
        net = _net(recipe, widest(partial(_net, recipe), task.budget * before.macs, image))
        fit(net, epochs=recipe.dense_epochs + recipe.epochs, lr=recipe.dense_lr)
    elif task.side in OURS:
        fit(net, epochs=recipe.epochs, lr=recipe.lr, callbacks=OURS[task.side](task.budget))
    else:
        _peer(task, net, recipe, image, task.budget * before.macs, fit)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    after = measure(net.eval(), image)
    metrics: dict[str, Any] = {
        "accuracy": accuracy(net, DATA, place),
        "macs": after.macs,
        "macs_fraction": after.macs / before.macs,
        "params": after.params,
        "params_fraction": after.params / before.params,
        **seconds,
    }
    return Found(case_of(task.budget), task.side, metrics, task.seed)


def _peer(task: Task, net: nn.Module, recipe: Recipe, image: Tensor, macs: float, fit: Any) -> None:
    peer = PEERS[task.side]
    pruner = peer.build(net, image, [net.get_submodule("fc")])
    learning = round(recipe.learning * recipe.epochs) if peer.learns else 0
    if learning:
        fit(net, epochs=learning, lr=recipe.lr, callbacks=[Learner(pruner)])
    prune_to(pruner, net.eval(), image, macs)
    fit(net, epochs=recipe.epochs - learning, lr=recipe.lr)
