"""The only code that carries edits out on a network, and the list of what a network has been through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.edits.companions import Companions
from lightning_compress.edits.keep import Keep
from lightning_compress.edits.quantize import Quantize
from lightning_compress.edits.replace import Replace
from lightning_compress.edits.structure import Change, EditError, Replacement, skeleton
from lightning_compress.quiet import without_observers

__all__ = ["EDIT_KINDS", "Edit", "apply_edits", "edits_from_json", "edits_to_json", "history", "rewind_edits"]

_HISTORY = "_compression_history"

Edit = Keep | Replace | Companions | Quantize
EDIT_KINDS: Mapping[str, type[Keep] | type[Replace] | type[Companions] | type[Quantize]] = {
    kind.kind: kind for kind in (Keep, Replace, Companions, Quantize)
}


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> list[Change | Replacement]:
    """Change the structure of `model`, in order; all of the edits, or, if one does not fit, none.

    Parameters that are cut stay the same objects (their data is swapped, as `nn.Module.to` does), so optimizers, tied
    names and references that user code holds go on pointing at live tensors; state of the old shape is for the caller
    to cut with the returned changes. Layers that are replaced bring parameters of their own.

    Args:
        model: the network whose tensor names the edits speak of; a trained one or a skeleton.
        edits: what to do.

    Returns:
        What happened to the tensors, in order.

    Raises:
        EditError: an edit names a tensor or layer that is not there, or that has another shape. Nothing was changed.
        TypeError: an edit is none.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> slices = {"weight": {0: (0, 2)}, "bias": {0: (0, 2)}}
        >>> changes = apply_edits(net, [Keep(slices, {"weight": (3, 2), "bias": (3,)})])
        >>> net.weight.shape, len(history(net))
        (torch.Size([2, 2]), 1)
    """
    edits = list(edits)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(
                f"`edits` must be a list of edits, got {edit!r:.60} in it; edits_from_json makes edits of JSON data"
            )
    trial = model
    if len(edits) > 1:  # what an edit finds is what those before it left
        with without_observers(model):
            trial = skeleton(model)
    for edit in edits:
        edit.check(trial)
        if trial is not model:
            edit.apply(trial)
    changes = [change for edit in edits for change in edit.apply(model)]
    setattr(model, _HISTORY, (*history(model), *edits))
    return changes


def rewind_edits(model: nn.Module, length: int = 0) -> None:
    """Undo the newest edits until `length` of the history are left: shapes only, for weights to be loaded into.

    Args:
        model: a network with a history.
        length: how many of the oldest edits stay.
    """
    edits = history(model)
    for edit in reversed(edits[length:]):
        edit.revert(model)
    setattr(model, _HISTORY, edits[:length])


def history(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that `model` has been through, oldest first.

    Args:
        model: any network.

    Example:
        >>> history(nn.Linear(2, 3))
        ()
    """
    edits: tuple[Edit, ...] = getattr(model, _HISTORY, ())
    return edits


def edits_to_json(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Edits as JSON data (dicts, lists, strings and numbers only)."""
    return [edit.to_json() for edit in edits]


def edits_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[Edit, ...]:
    """The inverse of `edits_to_json`.

    Raises:
        EditError: an edit of a kind that this version does not know, or one with fields missing.
    """
    edits = []
    for item in data:
        kind = EDIT_KINDS.get(item.get("kind", ""))
        if kind is None:
            raise EditError(f"unknown kind of edit {item.get('kind')!r}; known: {sorted(EDIT_KINDS)}")
        try:
            edits.append(kind.from_json(item))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EditError(f"damaged edit of kind {kind.kind!r}: {error!r}") from error
    return tuple(edits)
