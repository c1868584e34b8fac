"""Labels in a batch whose structure only the user's step knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

__all__ = ["find_target"]

_KEYS = ("label", "labels", "target", "targets", "y")


def find_target(batch: Any, where: str | int | None, needed_by: Sequence[str]) -> Tensor | None:
    """The class labels [N] in a batch.

    Args:
        batch: what `training_step` got.
        where: key or index; None: the usual keys of a mapping, the second item of a sequence.
        needed_by: names of the losses that cannot do without.

    Raises:
        MisconfigurationException: they are needed and not there.

    Example:
        >>> import torch
        >>> find_target({"image": torch.zeros(2, 3), "label": torch.tensor([1, 0])}, None, [])
        tensor([1, 0])
    """
    found: Any = None
    if isinstance(batch, Mapping):
        keys = _KEYS if where is None else (where,)
        found = next((batch[key] for key in keys if key in batch), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        index = 1 if where is None else where
        found = batch[index] if isinstance(index, int) and -len(batch) <= index < len(batch) else None
    if isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point():
        return found
    if not needed_by and where is None:
        return None
    has = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise MisconfigurationException(
        f"losses {', '.join(needed_by) or '(metrics)'} need class labels [N] of whole numbers, and the batch has none "
        f"at {'the usual places' if where is None else repr(where)} (it is {has}); say where with `target`"
    )
