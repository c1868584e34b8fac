"""The LightningDataModule that all data sets of the zoo share: splits, batches, augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_compress.zoo.images import EpochShuffle, ImageSource, Prepare, Samples, mix_seeds, shift_and_flip

__all__ = ["ImageDataModule", "Split"]

Split = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]


class ImageDataModule(L.LightningDataModule):
    """Labelled images in batches of (float32 [N, in_channels, image_size, image_size], int64 [N]).

    Images are normalised by figures of the data set, not of the split. Batches depend on nothing but the seed
    (`seed_everything`), the epoch and the step, so that a resumed run sees what an uninterrupted one sees (with
    `num_workers=0`, which is fastest for sets in memory anyway). The test set is not read before `test`.

    Args:
        root: folder of the data, and where downloads go.
        in_channels: 1 or 3; gray images are repeated, coloured ones turned gray. None: what the data set has.
        num_classes: how many classes are expected; another number is an error. None: what the data set has.
        image_size: height and width to which images are resized, in pixels. None: what the data set has.
        batch_size: samples of a batch; an incomplete last batch is left out of training.
        val_fraction: share of the training set that is kept for validation, where there is no set for it.
        split_seed: which samples those are; independent of the seed of training.
        limit_train: train on so many of the training samples, the same ones each time. None: on all.
        augment: in training, shift each image by up to an eighth of its side, and mirror half of them where the
            classes allow (on the device, a batch at a time; validation is on the images as they are).
        num_workers: processes that load batches.

    Raises:
        ValueError: an argument is out of its range, or does not fit the data.

    Example:
        >>> from lightning_compress.zoo import Digits
        >>> isinstance(Digits(batch_size=32), ImageDataModule)
        True
    """

    # What subclasses state: the data set's own size, its mean and std (0 to 1) and whether mirroring keeps a class.
    title: ClassVar[str]
    native_channels: ClassVar[int]
    native_classes: ClassVar[int | None]
    native_size: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    mirror: ClassVar[bool] = True

    def __init__(
        self,
        root: str | Path = "data",
        *,
        in_channels: int | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        limit_train: int | None = None,
        augment: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.in_channels = self.native_channels if in_channels is None else in_channels
        self.image_size = self.native_size if image_size is None else image_size
        self.num_classes = self._count_classes() if num_classes is None else num_classes
        if self.in_channels not in (1, 3):
            raise ValueError(f"`in_channels` must be 1 or 3, got {in_channels}")
        if self.native_classes not in (None, self.num_classes):
            raise ValueError(f"`num_classes` is {num_classes}, but {self.title} has {self.native_classes} classes")
        if not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction` must be between 0 and 1, got {val_fraction}")
        for key, value, least in (
            ("image_size", self.image_size, 1),
            ("batch_size", batch_size, 1),
            ("limit_train", limit_train, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{key}` must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.limit_train = limit_train
        self.augment = augment
        self.num_workers = num_workers
        self._samples: dict[Split, Samples] = {}
        self._seed = 0

    def read(self, split: Split) -> ImageSource | None:
        """The images of one split as they are stored; None for "val" where it is to be cut off the training set."""
        raise NotImplementedError

    def _count_classes(self) -> int:
        assert self.native_classes is not None  # else the subclass counts
        return self.native_classes

    def setup(self, stage: str) -> None:
        """Read what the stage needs: train and validation together, the test set only to test."""
        if stage in ("fit", "validate") and "train" not in self._samples:
            train, val = self._read("train"), self.read("val")
            kept, held_out = self._divide(len(train.labels), self.val_fraction if val is None else 0.0)
            if self.limit_train is not None and self.limit_train > len(kept):
                raise ValueError(
                    f"`limit_train` is {self.limit_train}, but {self.title} has {len(kept)} samples to train on"
                )
            self._samples["train"] = self._prepared(train, kept[: self.limit_train])
            self._samples["val"] = self._prepared(train, held_out) if val is None else self._all(val)
        if stage == "test" and "test" not in self._samples:
            self._samples["test"] = self._all(self._read("test"))

    def _read(self, split: Split) -> ImageSource:
        source = self.read(split)
        assert source is not None  # only "val" may be missing
        return source

    def _divide(self, count: int, fraction: float) -> tuple[Tensor, Tensor]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        held_out = max(1, round(count * fraction)) if fraction else 0
        return order[held_out:], order[:held_out]

    def _all(self, source: ImageSource) -> Samples:
        return self._prepared(source, torch.arange(len(source.labels)))

    def _prepared(self, source: ImageSource, indices: Tensor) -> Samples:
        return Samples(source, indices, Prepare(self.in_channels, self.image_size, self.mean, self.std))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the training set, shuffled."""
        self._seed = torch.initial_seed()
        samples = self._samples["train"]
        return self._loader(samples, EpochShuffle(samples, self._seed), drop_last=len(samples) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation set, in order."""
        return self._loader(self._samples["val"])

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test set, in order."""
        return self._loader(self._samples["test"])

    def _loader(
        self, samples: Samples, sampler: EpochShuffle | None = None, drop_last: bool = False
    ) -> DataLoader[Batch]:
        return DataLoader(
            samples,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch."""
        trainer = self.trainer
        if not self.augment or trainer is None or not trainer.training:
            return batch
        images, labels = batch
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        generator = torch.Generator().manual_seed(mix_seeds(self._seed, step, trainer.global_rank))
        return shift_and_flip(images, max(1, self.image_size // 8), self.mirror, generator), labels


def _as_it_is(batch: Any) -> Any:
    return batch  # Samples gives whole batches; DataLoader would take them for lists of samples
