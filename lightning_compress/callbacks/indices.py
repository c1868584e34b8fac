"""Which samples of the data set a training batch holds, without a change to the batch.

A DataLoader draws lists of indices from its batch sampler and gives batches in the same order, however many workers
and batches ahead there are. So it is enough to write down what the batch sampler yields.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["IndexFeed", "TrainingFeed", "check_repeatable"]


class IndexFeed:
    """The indices of a DataLoader's batches, one batch at a time.

    Between `attach` and `detach` the loader has a stand-in for its batch sampler. It only sees iterators that are made
    after `attach`; a new iterator drops what was left of the one before. The stand-in passes everything through
    (`loader.batch_sampler.sampler.set_epoch`, say), and a copy or pickle of the loader holds the batch sampler itself.

    Args:
        loader: a DataLoader of a map-style data set.

    Raises:
        MisconfigurationException: batches of this loader are not lists of places in a data set.

    Example:
        >>> loader = DataLoader(torch.arange(10), batch_size=4)
        >>> feed = IndexFeed(loader)
        >>> feed.attach()
        >>> for batch in loader:
        ...     print(batch.tolist(), feed.take())
        [0, 1, 2, 3] [0, 1, 2, 3]
        [4, 5, 6, 7] [4, 5, 6, 7]
        [8, 9] [8, 9]
        >>> feed.detach()
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = _checked(loader)
        self._recorder: _Recorder | None = None

    def attach(self) -> None:
        """Begin to record, with the next iterator."""
        if self._recorder is None:
            self._recorder = _Recorder(self.loader.batch_sampler)
            self._exchange(self._recorder)

    def take(self) -> list[int]:
        """The indices of the next batch. Call it once for each batch that the loader gives.

        Raises:
            MisconfigurationException: the loader has drawn no more batches since `attach`.
        """
        lists = self._recorder.lists if self._recorder is not None else None
        if not lists:
            raise MisconfigurationException(
                "which samples the batch holds is not known: its iterator was made before the feed was attached, "
                f"or {type(self.loader).__name__} does not draw from its `batch_sampler` when it is iterated. "
                "A teacher's outputs cannot be cached then; use cache=None"
            )
        return lists.popleft()

    def detach(self) -> None:
        """Put the loader's batch sampler back."""
        if self._recorder is not None:
            self._exchange(self._recorder.inner)
            self._recorder = None

    def _exchange(self, batch_sampler: Any) -> None:
        # DataLoader forbids to set the attribute, because an iterator of persistent workers would not see it; that
        # one is told below.
        self.loader.__dict__["batch_sampler"] = batch_sampler
        living: Any = getattr(self.loader, "_iterator", None)
        if living is not None:
            living._index_sampler = batch_sampler


class TrainingFeed:
    """The indices of a Trainer's training batches.

    Lightning makes the training DataLoader, and at once its first iterator, before `on_train_start`; workers begin to
    load then. So this is attached in a callback's `setup`, and gets hold of each training DataLoader in between, when
    Lightning hands it to the strategy. The order of the samples is what it is without.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._feed: IndexFeed | None = None
        self._strategy: Any = None
        self._own: Any = None  # the strategy's own attribute, if somebody else has wrapped the method before

    @property
    def loader(self) -> DataLoader[Any]:
        """The training DataLoader, from `on_train_start` on.

        Raises:
            MisconfigurationException: there are several.
        """
        loader = _checked(self._trainer.train_dataloader)
        if self._feed is None or self._feed.loader is not loader:
            raise MisconfigurationException(
                "the training DataLoader was made before the feed was attached; attach it in the callback's `setup`"
            )
        return loader

    def attach(self) -> None:
        """Begin to watch for training DataLoaders; to be called in a callback's `setup`."""
        strategy: Any = self._trainer.strategy
        process = strategy.process_dataloader

        @functools.wraps(process)
        def follow(dataloader: object) -> object:
            if self._trainer.training and self._trainer.state.fn == TrainerFn.FITTING:
                self._follow(dataloader)
            return process(dataloader)

        self._strategy, self._own = strategy, strategy.__dict__.get("process_dataloader")
        strategy.process_dataloader = follow

    def take(self) -> list[int]:
        """The indices of the next training batch; to be called once for each, on every rank.

        Raises:
            MisconfigurationException: they are not known.
        """
        _ = self.loader
        assert self._feed is not None
        return self._feed.take()

    def detach(self) -> None:
        """Leave strategy and DataLoader as they came."""
        if self._feed is not None:
            self._feed.detach()
        if self._strategy is not None:
            if self._own is None:
                del self._strategy.process_dataloader
            else:
                self._strategy.process_dataloader = self._own
        self._feed = self._strategy = None

    def _follow(self, loader: Any) -> None:
        if self._feed is not None:
            self._feed.detach()
        self._feed = IndexFeed(loader)
        self._feed.attach()


class _Recorder:
    """Stands in for a batch sampler and writes down what it yields."""

    inner: Any
    lists: deque[list[int]]

    def __init__(self, inner: Any) -> None:
        self.__dict__.update(inner=inner, lists=deque())

    def __iter__(self) -> Iterator[Any]:
        lists: deque[list[int]] = deque()
        self.__dict__["lists"] = lists
        return self._recorded(iter(self.inner), lists)

    def _recorded(self, batches: Iterator[Any], lists: deque[list[int]]) -> Iterator[Any]:
        for batch in batches:
            if lists is not self.lists:
                raise MisconfigurationException(
                    "two iterators of the training DataLoader are in use at once, so that it is not known which "
                    "samples a batch holds; use another DataLoader, or cache=None"
                )
            lists.append(_as_indices(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.inner,)


def _itself(batch_sampler: Any) -> Any:
    return batch_sampler


def _as_indices(batch: Iterable[Any]) -> list[int]:
    try:
        return [operator.index(index) for index in batch]
    except TypeError as error:
        raise MisconfigurationException(
            f"outputs are cached by a sample's place in the data set, but the batch sampler yields {batch!r}; "
            "use cache=None"
        ) from error


def _checked(loader: object) -> DataLoader[Any]:
    """The loader, if its batches are lists of places in a data set, and come in order."""
    if not isinstance(loader, DataLoader):
        reason = f"the training data must be one torch DataLoader, got {type(loader).__name__}"
    elif isinstance(loader.dataset, IterableDataset):
        reason = f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no index"
    elif loader.batch_sampler is None:
        reason = "the DataLoader has batch_size=None: the data set makes the batches, and their samples have no index"
    elif not loader.in_order and loader.num_workers > 0:
        reason = "the DataLoader has in_order=False: batches come in another order than their indices were drawn"
    else:
        return loader
    raise MisconfigurationException(f"a teacher's outputs cannot be cached: {reason}. Change it, or use cache=None")


def check_repeatable(dataset: Any, places: int = 8) -> None:
    """Raise if reading a sample twice gives two different samples.

    Some samples only, and only what the data set itself does: an augmentation that is seeded by the step, or that
    comes after the DataLoader (in `on_after_batch_transfer`, as `ImageDataModule(augment=True)` does it, or in
    `training_step`), is not seen here. `OutputCache` finds it by the fingerprint, when a sample comes the second time.

    Args:
        dataset: a map-style data set; its samples are pytrees of tensors, arrays, numbers, strings or PIL images. What
            cannot be compared counts as equal.
        places: how many samples are read, evenly spaced.

    Raises:
        MisconfigurationException: a sample is another the second time.

    Example:
        >>> check_repeatable([(torch.ones(2), 1), (torch.zeros(2), 0)])
    """
    count = len(dataset)
    chosen = sorted({place * count // places for place in range(places)}) if count else []
    with isolate_rng():
        unlike = next((index for index in chosen if not _same(dataset[index], dataset[index])), None)
    if unlike is not None:  # not raised inside: isolate_rng puts nothing back after an error
        raise MisconfigurationException(
            f"sample {unlike} of the training data set is another at each reading: it is augmented randomly, so a "
            "teacher's cached outputs would belong to other inputs. Use cache=None, or a data set without random "
            "augmentation"
        )


def _same(a: Any, b: Any) -> bool:
    (ours, structure), (theirs, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return structure == other and all(_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray | np.generic):
        return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, float):
        return a == b or (a != a and b != b)
    comparable = type(a).__eq__ is not object.__eq__  # type: ignore[comparison-overlap]
    return not comparable or bool(a == b)
