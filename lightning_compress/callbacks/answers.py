"""Teachers whose outputs are kept by sample, so that each sample is taught once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.indices import IndexFeed, check_repeatable
from lightning_compress.distill.cache import OutputCache, weights_digest
from lightning_compress.distill.engine import TeacherCall

__all__ = ["CachedAnswers"]


class CachedAnswers:
    """The outputs of several teachers in a folder.

    Args:
        folder: where they are kept.
        trainer: the Trainer, whose training data have been set up.
        teachers: the networks; a file belongs to one network's weights.

    Raises:
        MisconfigurationException: the training data give another input each time, or samples have no places.
        CacheError: the folder holds the outputs of another data set.
    """

    def __init__(self, folder: str | Path, trainer: pl.Trainer, teachers: Sequence[nn.Module]) -> None:
        loader: Any = trainer.train_dataloader
        self._feed = IndexFeed(loader)
        check_repeatable(loader.dataset)
        self._caches = [OutputCache(folder, len(loader.dataset), weights_digest(teacher)) for teacher in teachers]
        self._indices: list[int] = []
        self._feed.attach()

    def next_batch(self) -> None:
        """A training batch begins: these are its samples."""
        self._indices = self._feed.take()

    def of(self, index: int, teacher: TeacherCall) -> TeacherCall:
        """A teacher that looks into the cache first."""
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
