"""The indices taken are those of the batch, whatever loads it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from lightning_compress.callbacks.indices import IndexFeed, TrainingFeed, check_repeatable
from lightning_compress.distill.cache import CacheError, OutputCache
from lightning_compress.zoo.datamodule import ImageDataModule
from lightning_compress.zoo.images import EpochShuffle, MemoryImages, Samples

ROOT = Path(__file__).parents[2]
SAMPLES = 22
DATA = torch.arange(float(SAMPLES))[:, None]


class Plain(Dataset[Tensor]):
    """Sample i is the number i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return DATA[index]


class Module(pl.LightningModule):
    """Remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch[:, 0].int().tolist())
        return self.net(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Taking(pl.Callback):
    """Takes the indices of each training batch, as Distillation does."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.feed = TrainingFeed(trainer)
        self.feed.attach()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self.taken.append(self.feed.take())
        self.dataset = self.feed.loader.dataset

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.feed.detach()


def fit(folder: Path, loader: Any, *callbacks: pl.Callback, **options: Any) -> list[list[int]]:
    """Train; the batches that the steps saw."""
    torch.manual_seed(0)
    module = Module()
    settings: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[*callbacks], default_root_dir=folder, **(settings | quiet | options))
    trainer.fit(module, loader, DataLoader(DATA, 5))
    assert "process_dataloader" not in vars(trainer.strategy)
    return module.seen


class Epochs(BatchSampler):
    """An order that depends on the epoch, which Lightning tells the sampler in the batch sampler."""

    def __init__(self) -> None:
        dataset = Samples(MemoryImages(DATA, DATA), torch.arange(SAMPLES), lambda x: x)
        super().__init__(EpochShuffle(dataset, seed=3), 5, drop_last=False)


LOADERS: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "incomplete batch left out": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2},
    "persistent workers": {"batch_size": 4, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    "one worker, in any order": {"batch_size": 4, "in_order": False},
    "with replacement": {"batch_size": 4, "sampler": torch.utils.data.RandomSampler(Plain(), replacement=True)},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda run: "-".join(run) or "plain",
)
def test_indices_are_those_of_the_batch(tmp_path: Path, options: dict[str, Any], run: dict[str, Any]) -> None:
    loader = DataLoader(Plain(), **options)
    original, taking = loader.batch_sampler, Taking()
    seen = fit(tmp_path, loader, taking, **run)
    assert taking.taken == seen
    assert len(seen) >= 9
    assert loader.batch_sampler is original
    # Another run, without the feed, has the same batches.
    assert fit(tmp_path, DataLoader(Plain(), **options), **run) == seen


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_set_by_lightning_arrive(tmp_path: Path, workers: int) -> None:
    taking = Taking()
    seen = fit(tmp_path, DataLoader(Plain(), batch_sampler=Epochs(), num_workers=workers), taking)
    assert taking.taken == seen
    assert seen == fit(tmp_path, DataLoader(Plain(), batch_sampler=Epochs(), num_workers=workers))
    assert seen[:5] != seen[5:10] != seen[10:]


def test_distributed_sampler_gives_places_in_the_whole_data_set() -> None:
    sampler = DistributedSampler(Plain(), num_replicas=2, rank=1, shuffle=True)
    loader = DataLoader(Plain(), 4, sampler=sampler)
    feed = IndexFeed(loader)
    feed.attach()
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)
        assert sampler.epoch == epoch
        for batch in loader:
            assert feed.take() == batch[:, 0].int().tolist()
    feed.detach()


def test_two_processes_of_a_trainer(tmp_path: Path) -> None:
    """Lightning puts a DistributedSampler into the loader, after the user made it."""
    command = [sys.executable, "-m", "tests.callbacks.test_indices", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["taken"] == rank["seen"]
    for epoch in range(3):  # three batches each
        batches = [batch for rank in ranks for batch in rank["seen"][3 * epoch : 3 * epoch + 3]]
        assert sorted(index for batch in batches for index in batch) == list(range(SAMPLES))


def test_indices_are_of_the_data_set_that_the_loader_holds(tmp_path: Path) -> None:
    subset, taking = Subset(Plain(), list(range(20, 2, -1))), Taking()
    seen = fit(tmp_path, DataLoader(subset, 4, shuffle=True), taking)
    assert [[int(subset[index]) for index in taken] for taken in taking.taken] == seen
    assert taking.taken != seen
    assert taking.dataset is subset


def test_second_fit_with_the_same_loader(tmp_path: Path) -> None:
    loader = DataLoader(Plain(), 4, shuffle=True, num_workers=1, persistent_workers=True)
    list(loader)  # there are workers already
    for _ in range(2):
        taking = Taking()
        assert taking.taken == [] != fit(tmp_path, loader, taking) == taking.taken


def test_living_iterator_of_persistent_workers_gets_its_sampler_back() -> None:
    loader = DataLoader(Plain(), 4, num_workers=1, persistent_workers=True)
    feed = IndexFeed(loader)
    feed.attach()
    first = [(feed.take(), batch[:, 0].int().tolist()) for batch in loader]
    assert all(ours == theirs for ours, theirs in first)
    feed.detach()
    assert loader._iterator._index_sampler is loader.batch_sampler
    assert type(loader.batch_sampler) is BatchSampler
    assert len(list(loader)) == len(first)


def test_unfinished_iterator_is_dropped() -> None:
    loader = DataLoader(Plain(), 4, shuffle=True, num_workers=1)
    feed = IndexFeed(loader)
    feed.attach()
    next(iter(loader))
    for batch in loader:
        assert feed.take() == batch[:, 0].int().tolist()
    with pytest.raises(MisconfigurationException, match="which samples the batch holds is not known"):
        feed.take()


def test_two_iterators_at_once() -> None:
    loader = DataLoader(Plain(), 4)
    feed = IndexFeed(loader)
    feed.attach()
    batches = iter(loader)
    next(batches)
    next(iter(loader))
    with pytest.raises(MisconfigurationException, match="two iterators"):
        next(batches)


def test_iterator_from_before() -> None:
    loader = DataLoader(Plain(), 4)
    batches = iter(loader)
    feed = IndexFeed(loader)
    feed.attach()
    next(batches)
    with pytest.raises(MisconfigurationException, match="made before the feed was attached"):
        feed.take()


def test_attaching_late_is_refused(tmp_path: Path) -> None:
    class Late(Taking):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pass

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().setup(trainer, pl_module, "fit")

    with pytest.raises(MisconfigurationException, match="attach it in the callback's `setup`"):
        fit(tmp_path, DataLoader(Plain(), 4), Late())


def test_stand_in_passes_everything_through() -> None:
    loader = DataLoader(Plain(), 4, drop_last=True)
    original = loader.batch_sampler
    feed = IndexFeed(loader)
    feed.attach()
    feed.attach()
    assert len(loader) == len(original)
    assert loader.batch_sampler.drop_last
    assert loader.batch_sampler.sampler is original.sampler
    loader.batch_sampler.batch_size = 2
    assert original.batch_size == 2
    for twin in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert type(twin.batch_sampler) is BatchSampler
        assert len(list(twin)) == 11
    feed.detach()
    assert loader.batch_sampler is original
    feed.detach()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(DATA)


REFUSED: dict[str, Any] = {
    "IterableDataset, whose samples have no index": DataLoader(Stream(), 4),
    "batch_size=None": DataLoader(Plain(), batch_size=None),
    "in_order=False": DataLoader(Plain(), 4, num_workers=1, in_order=False),
    "one torch DataLoader, got list": [DataLoader(Plain(), 4), DataLoader(Plain(), 4)],
    "one torch DataLoader, got dict": {"a": DataLoader(Plain(), 4)},
    "one torch DataLoader, got tuple": (Plain(), 4),
}


@pytest.mark.parametrize(("message", "loader"), REFUSED.items(), ids=REFUSED)
def test_what_has_no_indices(tmp_path: Path, message: str, loader: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"{message}.*use cache=None"):
        IndexFeed(loader)
    if not isinstance(loader, tuple):
        with pytest.raises(MisconfigurationException, match=f"{message}.*use cache=None"):
            fit(tmp_path, loader, Taking())


def test_keys_are_no_indices() -> None:
    loader = DataLoader({"a": 1.0, "b": 2.0}, batch_sampler=[["a"], ["b"]])
    feed = IndexFeed(loader)
    feed.attach()
    with pytest.raises(MisconfigurationException, match=r"yields \['a'\]"):
        next(iter(loader))


class Made(Dataset[Any]):
    """Makes a sample of its index."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def image(value: int) -> Any:
    return pytest.importorskip("PIL.Image").new("L", (2, 2), value)


RANDOM = {
    "tensor": lambda i: (torch.rand(2), i),
    "nested": lambda i: {"x": [i, {"y": torch.randn(1)}]},
    "array": lambda i: np.random.default_rng().normal(size=2),
    "number": lambda i: torch.rand(()).item(),
    "shape": lambda i: torch.zeros(int(torch.randint(10**6, ()))),
    "image": lambda i: image(int(torch.randint(256, ()))),
    "one sample only": lambda i: torch.rand(1) if i == 20 else 1,
}
FIXED = {
    "tensor": lambda i: (torch.full((2,), i), i),
    "nan": lambda i: (torch.full((2,), torch.nan), float("nan"), np.full(2, np.nan)),
    "others": lambda i: {"name": f"{i}", "none": None, "array": np.arange(i), "complex": torch.tensor(1j), "b": True},
    "image": image,
    "what cannot be compared": lambda i: object(),
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_random_samples(make: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(MisconfigurationException, match=r"sample \d+ of the training data set is another at each"):
        check_repeatable(Made(make))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)
def test_samples_that_stay(make: Any) -> None:
    check_repeatable(Made(make))


def test_few_samples() -> None:
    check_repeatable([])
    with pytest.raises(MisconfigurationException, match="sample 0"):
        check_repeatable(Subset(Made(RANDOM["tensor"]), [0]))


class Patterns(ImageDataModule):
    """Images in memory."""

    title, native_channels, native_classes, native_size = "Patterns", 1, 4, 8
    mean, std = (0.5,), (0.25,)

    def read(self, split: str) -> MemoryImages | None:
        images = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return None if split == "val" else MemoryImages(images, torch.arange(40) % 4)


class Caching(Taking):
    """Keeps the mean of each image that the step gets."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.known = folder, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dataset: Any = self.feed.loader.dataset
        check_repeatable(dataset)
        self.cache = OutputCache(self.folder, len(dataset), "mean")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        indices, mean = self.feed.take(), batch[0].mean((1, 2, 3))
        known = self.cache.lookup(indices, batch[:1])
        self.known += known is not None
        if known is None:
            self.cache.store(indices, batch[:1], mean)
        else:
            assert torch.equal(known, mean)


class Images(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0].mean((1, 2, 3))[:, None]).sum()


@pytest.mark.parametrize("augment", [False, True])
def test_augmentation_of_our_own_data_sets_is_found(tmp_path: Path, augment: bool) -> None:
    """By the fingerprint, when a sample comes the second time: reading a sample twice does not show it."""
    caching = Caching(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, enable_checkpointing=False, limit_val_batches=0, callbacks=[caching], **quiet
    )
    data = Patterns(tmp_path, batch_size=6, augment=augment)
    if augment:
        with pytest.raises(CacheError, match="augmented randomly"):
            trainer.fit(Images(), data)
        assert trainer.current_epoch == 1
    else:
        trainer.fit(Images(), data)
        assert caching.known == 6


def main(folder: Path) -> None:
    taking = Taking()
    seen = fit(folder, DataLoader(Plain(), 4, shuffle=True), taking, devices=2, strategy="ddp")
    rank = os.environ.get("LOCAL_RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps({"taken": taking.taken, "seen": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
