"""The dense networks of the training-free benchmark and their data: trained once, kept in the work folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from rich import box
from rich.table import Table
from torch import Tensor, nn

from benchmarks.distillation_runs import DecodedFolder, Place
from lightning_compress import measure
from lightning_compress.calls import Call, as_calls
from lightning_compress.files import open_atomic
from lightning_compress.zoo.datasets import FashionMNIST, ImageDataModule
from lightning_compress.zoo.feedforward import MobileNetV2Small, VGGSmall, resnet20
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = [
    "CALIBRATION",
    "CLASSES",
    "FULL",
    "NETS",
    "QUICK",
    "Cell",
    "Dense",
    "Net",
    "Recipe",
    "accuracy",
    "build",
    "calibration_images",
    "channels_last",
    "dense_network",
    "images",
    "in_chunks",
    "marked_table",
    "train_dense",
    "trainer",
    "widest",
]

CLASSES = 10
CALIBRATION = 512  # unlabelled training images
CHUNK = 64  # images of one forward pass of the calibration
TEST_BATCH = 250
WIDTHS = 512  # widths that a bisection tells apart
SEED = 1000
UNSEEN = 1e-4  # share of the training set that is left for validation, which nothing here looks at


@dataclass(frozen=True)
class Net:
    """An architecture.

    Attributes:
        title: how the tables call it.
        build: builds it as `build(in_channels, num_classes, width=...)`.
        lr: highest learning rate of the dense training.
    """

    title: str
    build: Callable[..., nn.Module]
    lr: float


NETS = {
    "vgg_small": Net("VGG-small", VGGSmall, 0.05),
    "resnet20": Net("ResNet-20", resnet20, 0.1),
    "mobilenetv2_small": Net("MobileNetV2-small", MobileNetV2Small, 0.1),
}


@dataclass(frozen=True)
class Recipe:
    """How the dense networks are trained, and what is done to them.

    Attributes:
        samples: training samples; None: all.
        epochs: of each network.
        augment: shift and mirror the images, in the dense training and in the recovery.
        batch_size: of the dense training.
        budgets: fractions of the multiply-accumulates, of each network.
        recovery: data set -> the networks that are trained after they were compressed.
    """

    samples: int | None
    epochs: Mapping[str, int]
    augment: bool
    batch_size: int
    budgets: Mapping[str, tuple[float, ...]]
    recovery: Mapping[str, tuple[str, ...]]


FULL = Recipe(
    samples=None,
    epochs=dict.fromkeys(NETS, 60),
    augment=True,
    batch_size=128,
    budgets=dict.fromkeys(NETS, (0.5, 0.33, 0.2)),
    recovery=dict.fromkeys(("fashion-mnist", "cifar10"), tuple(NETS)),
)
QUICK = Recipe(
    samples=20_000,
    epochs={"vgg_small": 5, "resnet20": 6, "mobilenetv2_small": 5},
    augment=False,
    batch_size=128,
    budgets={"vgg_small": (0.5, 0.33), "resnet20": (0.5, 0.33), "mobilenetv2_small": (0.5,)},
    recovery={"fashion-mnist": ("vgg_small", "resnet20"), "cifar10": ("vgg_small",)},
)


@dataclass(frozen=True)
class Cell:
    """A data set, a network, and whether it is the short form."""

    data: str
    net: str
    quick: bool

    @property
    def recipe(self) -> Recipe:
        """What is done in it."""
        return QUICK if self.quick else FULL

    @property
    def case(self) -> str:
        """How the JSON file calls it."""
        return f"{self.data}, {self.net}"


@dataclass(frozen=True)
class Dense:
    """A trained network, and what its training gave.

    Attributes:
        net: the network, channels last; copy it before changing it.
        accuracy: top-1 on the whole test set after the last epoch, between 0 and 1.
        seconds: wall time of the training.
    """

    net: nn.Module
    accuracy: float
    seconds: float


def widest(build: Callable[[float], nn.Module], macs: float, image: Tensor) -> float:
    """The largest factor on the channels, up to 1, with which a network costs no more.

    Args:
        build: makes the network of a width.
        macs: multiply-accumulates allowed.
        image: of the size that counts.
    """
    low, high = 1, WIDTHS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(build(middle / WIDTHS).eval(), image).macs <= macs else (low, middle - 1)
    return low / WIDTHS


def channels_last(net: nn.Module) -> nn.Module:
    """The same network with its weights laid out as its inputs are: what a CPU trains fastest."""
    return net.to(memory_format=torch.channels_last)


def build(net: str, in_channels: int, width: float = 1.0) -> nn.Module:
    """A network with random weights."""
    return channels_last(NETS[net].build(in_channels, CLASSES, width=width))


@cache  # a worker's runs share the images
def images(data: str, place: Place, samples: int | None, augment: bool, batch_size: int) -> ImageDataModule:
    """The data set, ready for training and test."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "limit_train": samples,
        "augment": augment,
        "val_fraction": UNSEEN,
    }
    found: ImageDataModule
    if data == "cifar10":
        assert place.cifar10 is not None  # else no cell asks for it
        found = DecodedFolder(place.work, root=place.cifar10, num_classes=CLASSES, **options)
    else:
        found = FashionMNIST(place.fashion_mnist, **options)
    found.prepare_data()
    found.setup("fit")
    found.setup("test")
    return found


@cache
def calibration_images(cell: Cell, place: Place) -> Tensor:
    """Training images without labels and without augmentation: [CALIBRATION, C, H, W]."""
    data = images(cell.data, place, cell.recipe.samples, False, CHUNK)
    torch.manual_seed(0)  # which images those are
    batches = [batch for batch, _ in islice(data.train_dataloader(), CALIBRATION // CHUNK)]
    return torch.cat(batches).contiguous(memory_format=torch.channels_last)


def in_chunks(x: Tensor) -> tuple[Call, ...]:
    """Calibration calls, a chunk of the images each."""
    return tuple(call for chunk in x.split(CHUNK) for call in as_calls(chunk))


@cache
def dense_network(cell: Cell, place: Place) -> Dense:
    """The dense network of a cell, shared by the runs of a process."""
    return train_dense(cell, place)


@cache
def _test_batches(data: str, place: Place) -> tuple[tuple[Tensor, Tensor], ...]:
    loader = images(data, place, None, False, TEST_BATCH).test_dataloader()
    return tuple((x.contiguous(memory_format=torch.channels_last), labels) for x, labels in loader)


def accuracy(net: nn.Module, data: str, place: Place) -> float:
    """Top-1 on the whole test set, between 0 and 1."""
    net.eval()
    right = total = 0
    with torch.inference_mode():
        for x, labels in _test_batches(data, place):
            right += int((net(x).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def trainer(**options: Any) -> L.Trainer:
    """A Trainer that only trains."""
    return L.Trainer(
        devices=1,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def train_dense(cell: Cell, place: Place) -> Dense:
    """Train the dense network of a cell, or read it if it was trained before."""
    recipe = cell.recipe
    channels = {"fashion-mnist": 1, "cifar10": 3}[cell.data]
    own = (cell.data, cell.net, recipe.samples, recipe.epochs[cell.net], recipe.augment, recipe.batch_size)
    path = place.work / f"dense-{'-'.join(map(str, (*own, NETS[cell.net].lr)))}.pt"
    with FileLock(f"{path}.lock"):
        if path.is_file():
            found = torch.load(path, weights_only=True)
            net = build(cell.net, channels)
            net.load_state_dict(found["state_dict"])
            return Dense(net.eval(), found["accuracy"], found["seconds"])
        data = images(cell.data, place, recipe.samples, recipe.augment, recipe.batch_size)
        L.seed_everything(SEED, workers=True, verbose=False)
        net = build(cell.net, channels)
        task = ImageClassifier(net, CLASSES, lr=NETS[cell.net].lr)
        start = time.perf_counter()
        trainer(max_epochs=recipe.epochs[cell.net], accelerator=place.accelerator).fit(task, data)
        seconds = time.perf_counter() - start
        net = net.cpu().eval()
        dense = Dense(net, accuracy(net, cell.data, place), seconds)
        with open_atomic(path) as file:
            state = {"state_dict": net.state_dict(), "accuracy": dense.accuracy, "seconds": dense.seconds}
            torch.save(state, file)
        return dense


def marked_table(*columns: str, left: int = 1) -> Table:
    """An empty table in Markdown, its first columns aligned to the left."""
    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table
