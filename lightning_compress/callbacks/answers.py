"""Teachers whose outputs are kept by sample, so that each sample is taught once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.indices import TrainingFeed, check_repeatable
from lightning_compress.distill.cache import OutputCache, weights_digest
from lightning_compress.distill.engine import TeacherCall
from lightning_compress.distill.teachers import FrozenTeacher

__all__ = ["CachedAnswers"]


class CachedAnswers:
    """The outputs of several teachers in a folder. To be made in a callback's `setup`, before there is a DataLoader.

    Args:
        folder: where they are kept.
        trainer: the Trainer.
    """

    def __init__(self, folder: str | Path, trainer: pl.Trainer) -> None:
        self._folder = folder
        self._feed = TrainingFeed(trainer)
        self._feed.attach()
        self._caches: list[OutputCache] = []
        self._indices: list[int] = []

    def open(self, teachers: Sequence[FrozenTeacher], precision: str) -> None:
        """Open the files, when training starts.

        Args:
            teachers: the teachers; a file belongs to one network's weights in one precision.
            precision: of the training step.

        Raises:
            MisconfigurationException: the training data give another input each time, or samples have no places.
            CacheError: the folder holds the outputs of another data set.
        """
        dataset: Any = self._feed.loader.dataset
        check_repeatable(dataset)
        names = [f"{weights_digest(t.network)}-{t.spec.precision or precision}" for t in teachers]
        self._caches = [OutputCache(self._folder, len(dataset), name) for name in names]

    def next_batch(self) -> None:
        """A training batch begins: these are its samples."""
        self._indices = self._feed.take()

    def of(self, index: int, teacher: TeacherCall) -> TeacherCall:
        """A teacher that looks into the cache first, once this is open."""
        if not self._caches:
            return teacher
        cache = self._caches[index]

        def ask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
            inputs = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
            known = cache.lookup(self._indices, inputs)
            if known is None:
                known = teacher(args, kwargs)[""]
                cache.store(self._indices, inputs, known)
            return {"": known}

        return ask

    def close(self) -> None:
        """Leave the loader as it came."""
        self._feed.detach()
