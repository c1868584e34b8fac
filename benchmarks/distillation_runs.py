"""One run of the distillation benchmark: a teacher trained once, or a student on one side with one seed."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from torch import nn

from benchmarks.distillation_sides import PAIRS, SIDES
from lightning_compress import Distillation
from lightning_compress.files import open_atomic
from lightning_compress.zoo.datasets import FashionMNIST, ImageDataModule, ImageFolder
from lightning_compress.zoo.images import FileImages, ImageSource, MemoryImages
from lightning_compress.zoo.tasks import ImageClassifier

__all__ = [
    "DATA",
    "FULL",
    "QUICK",
    "Cell",
    "Place",
    "Recipe",
    "Row",
    "prepare",
    "start_worker",
    "train_student",
    "train_teacher",
]

DATA = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG)"}
CLASSES = 10
TEACHER_SEED = 1000
OF_TEACHER = ("teacher_width", "teacher_samples", "teacher_epochs", "lr", "batch_size", "image_size")
UNSEEN = 1e-4  # share of the training set that is left for validation, which nothing here looks at


@dataclass(frozen=True)
class Recipe:
    """How teacher and student of a pair are trained.

    Attributes:
        teacher_width: factor on the teacher's channels.
        student_width: on the student's.
        teacher_samples: training samples of the teacher; None: all.
        samples: of the student, among the teacher's; None: all.
        teacher_epochs: epochs of the teacher, which is always trained with shifted and mirrored images.
        epochs: of the student.
        lr: highest learning rate of both.
        batch_size: of both.
        image_size: pixels that images are resized to; None: as they are.
        hint_weight: of FitNet beside KD.
        augment: also shift and mirror the student's images. Without, the teacher's outputs are computed once a run.
    """

    teacher_width: float = 1.0
    student_width: float = 1.0
    teacher_samples: int | None = None
    samples: int | None = None
    teacher_epochs: int = 240
    epochs: int = 240
    lr: float = 0.05
    batch_size: int = 64
    image_size: int | None = None
    hint_weight: float = 100.0
    augment: bool = True


# mdistiller's schedule for CIFAR-100: 240 epochs, batch 64, a fifth of the learning rate for MobileNetV2.
FULL = {"resnet": Recipe(), "mobilenet": Recipe(lr=0.01)}
QUICK = {
    "resnet": Recipe(
        teacher_width=0.5,
        student_width=0.5,
        teacher_samples=20_000,
        samples=3_000,
        teacher_epochs=8,
        epochs=12,
        lr=0.1,
        image_size=16,
        hint_weight=10.0,  # with 100, some runs as short as these do not learn
        augment=False,
    ),
    "mobilenet": Recipe(
        student_width=0.5,
        teacher_samples=20_000,
        samples=2_000,
        teacher_epochs=10,
        epochs=8,
        image_size=16,
        hint_weight=10.0,  # with 100, some runs as short as these do not learn
        augment=False,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        fashion_mnist: folder of Fashion-MNIST, besides where the data module looks anyway.
        cifar10: folder with train/<class>/ and test/<class>/; None if there is none.
        work: folder for teachers and decoded images.
        accelerator: Lightning's.
    """

    fashion_mnist: Path
    cifar10: Path | None
    work: Path
    accelerator: str


@dataclass(frozen=True)
class Cell:
    """A data set, a pair and its recipe."""

    data: str
    pair: str
    recipe: Recipe


@dataclass(frozen=True)
class Row:
    """What a run gave.

    Attributes:
        data: name of the data set.
        pair: name of the pair.
        side: name of the side; "teacher" for a teacher.
        seed: of initial weights and order of the data.
        accuracy: top-1 on the whole test set after the last epoch, between 0 and 1.
        seconds: wall time of the training.
        cpu_seconds: processor time of it.
    """

    data: str
    pair: str
    side: str
    seed: int
    accuracy: float
    seconds: float
    cpu_seconds: float


class DecodedFolder(ImageFolder):
    """An `ImageFolder` that is decoded once for all processes: the images are kept in a file."""

    def __init__(self, kept: Path, **options: Any) -> None:
        super().__init__(**options)
        self.kept = kept

    def read(self, split: Any) -> ImageSource | None:
        """See `ImageDataModule.read`."""
        if split == "val":
            return None
        path = self.kept / f"cifar10-{split}-{self.image_size}.pt"
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                source = super().read(split)
                source = source.in_memory() if isinstance(source, FileImages) else source
                assert isinstance(source, MemoryImages)
                with open_atomic(path) as file:
                    torch.save({"images": source.images, "labels": source.labels}, file)
        return MemoryImages(**torch.load(path, weights_only=True))


@cache  # a worker's runs share the images
def images(data: str, place: Place, recipe: Recipe, samples: int | None, augment: bool) -> ImageDataModule:
    options: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size,
        "limit_train": samples,
        "augment": augment,
        "val_fraction": UNSEEN,
    }
    if data == "cifar10":
        assert place.cifar10 is not None  # else no cell asks for it
        return DecodedFolder(place.work, root=place.cifar10, num_classes=CLASSES, **options)
    return FashionMNIST(place.fashion_mnist, **options)


def prepare(cell: Cell, place: Place) -> None:
    """Look for the data, and decode it.

    Raises:
        FileNotFoundError: it is not there.
    """
    data = images(cell.data, place, cell.recipe, cell.recipe.samples, cell.recipe.augment)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")


def start_worker(threads: int) -> None:
    """What a process does before its first run."""
    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_compress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def train_teacher(cell: Cell, place: Place) -> Row:
    """Train the teacher of a cell, or read it if it was trained before."""
    return _trained_teacher(cell, place)[1]


def train_student(cell: Cell, place: Place, side: str, seed: int) -> Row:
    """Train a student on one side; its teacher must have been trained."""
    recipe, way = cell.recipe, SIDES[side]
    pair = replace(PAIRS[cell.pair], hint_weight=recipe.hint_weight)
    callbacks: list[L.Callback] = []
    with tempfile.TemporaryDirectory() as kept:
        if way.options is not None:
            network = _trained_teacher(cell, place)[0]
            cached = kept if not recipe.augment and not way.layers else None
            callbacks.append(Distillation(network, **way.options(pair), cache=cached, metrics=False))
        data = images(cell.data, place, recipe, recipe.samples, recipe.augment)
        L.seed_everything(seed, workers=True, verbose=False)
        net = _network(pair.student, data, recipe.student_width)
        return _train(net, data, cell, place, recipe.epochs, callbacks, side, seed)


def _trained_teacher(cell: Cell, place: Place) -> tuple[nn.Module, Row]:
    recipe, pair = cell.recipe, PAIRS[cell.pair]
    own = {key: getattr(recipe, key) for key in OF_TEACHER}
    data = images(cell.data, place, recipe, recipe.teacher_samples, True)
    L.seed_everything(TEACHER_SEED, workers=True, verbose=False)
    net = _network(pair.teacher, data, recipe.teacher_width)
    name = "-".join(str(v) for v in (cell.data, cell.pair, *own.values()))
    path = place.work / f"teacher-{name}.pt"
    if path.is_file():
        found = torch.load(path, weights_only=True)
        net.load_state_dict(found["state_dict"])
        return net, Row(**found["row"])
    row = _train(net, data, cell, place, recipe.teacher_epochs, [], "teacher", TEACHER_SEED)
    with open_atomic(path) as file:
        torch.save({"state_dict": net.state_dict(), "row": asdict(row), "recipe": own}, file)
    return net, row


def _network(build: Any, data: ImageDataModule, width: float) -> nn.Module:
    net: nn.Module = build(data.in_channels, CLASSES, width=width)
    return net.to(memory_format=torch.channels_last)


def _train(
    net: nn.Module,
    data: ImageDataModule,
    cell: Cell,
    place: Place,
    epochs: int,
    callbacks: list[L.Callback],
    side: str,
    seed: int,
) -> Row:
    task = ImageClassifier(net, CLASSES, lr=cell.recipe.lr)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator=place.accelerator,
        devices=1,
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with _clock() as times:
        trainer.fit(task, data)
    accuracy = float(trainer.test(task, data, verbose=False)[0]["test/acc"])
    return Row(cell.data, cell.pair, side, seed, accuracy, *times)


@contextmanager
def _clock() -> Iterator[list[float]]:
    times: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield times
    times += [time.perf_counter() - wall, time.process_time() - cpu]
