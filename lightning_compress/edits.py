"""Edits: structural changes as plain data, and the only code that carries them out.

An edit says *what* changes, never *why*: it can be written to JSON, stored in a checkpoint and replayed on a
trained network (weights are carried over) or on a skeleton (shapes only). The ordered list of the edits a network
has been through is its `history`; the checkpoint, the artifact and the report all read that one list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = [
    "Change",
    "Edit",
    "EditError",
    "Keep",
    "apply_edits",
    "edits_from_json",
    "edits_to_json",
    "history",
    "named_tensors",
    "rewind_edits",
    "skeleton",
]

Attribute = int | tuple[int, ...]
_HISTORY = "_compression_history"


class EditError(ValueError):
    """An edit that does not fit the network it is applied to."""


@dataclass(frozen=True)
class Change:
    """What an edit did to one tensor, for whoever holds state of the same shape (an optimizer, an average).

    Attributes:
        tensor: the parameter or buffer, the same object before and after.
        old_shape: its shape before.
        keep: for each dim that was cut, the indices that survive.
    """

    tensor: Tensor
    old_shape: torch.Size
    keep: Mapping[int, Tensor]

    def slice(self, like: Tensor) -> Tensor:
        """Cut a tensor of the old shape in the same way.

        Args:
            like: a tensor of shape `old_shape`.

        Returns:
            A new tensor of the new shape, contiguous in the same memory format.
        """
        return _index(like, self.keep)


@dataclass(frozen=True)
class Keep:
    """Which indices of which dims of which tensors survive.

    Attributes:
        slices: tensor name -> dim -> surviving indices, ascending.
        sizes: the shape that each of those tensors must have before the edit.
        attributes: module name -> attribute -> (before, after), for sizes that modules hold in Python (`groups`).
        origin: the method that asked for it, for the report.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> keep = Keep(
        ...     slices={"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "1.weight": {1: (0, 2)}},
        ...     sizes={"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3)},
        ...     attributes={"0": {"out_features": (3, 2)}, "1": {"in_features": (3, 2)}},
        ... )
        >>> changes = apply_edits(net, [keep])
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> history(net) == (keep,)
        True
    """

    kind: ClassVar[str] = "keep"

    slices: Mapping[str, Mapping[int, tuple[int, ...]]]
    sizes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, tuple[Attribute, Attribute]]] = field(default_factory=dict)
    origin: str = ""

    def new_size(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` after the edit."""
        dims = self.slices[name]
        return tuple(len(dims[d]) if d in dims else size for d, size in enumerate(self.sizes[name]))

    def check(
        self, shapes: dict[str, tuple[int, ...]], model: nn.Module, attributes: dict[tuple[str, str], Any]
    ) -> None:
        """Raise unless the edit fits; `shapes` and `attributes` are brought up to date as if it had been applied."""
        for name, dims in self.slices.items():
            if name not in shapes:
                raise EditError(f"edit of {name!r}: the network has no such tensor; is it another architecture?")
            if shapes[name] != self.sizes[name]:
                raise EditError(
                    f"edit of {name!r}: expected shape {list(self.sizes[name])}, got {list(shapes[name])}; "
                    "was it applied before, or is this another architecture?"
                )
            for dim, indices in dims.items():
                size = self.sizes[name][dim] if dim < len(self.sizes[name]) else 0
                ordered = list(indices) == sorted(set(indices))
                if not indices or not ordered or indices[0] < 0 or indices[-1] >= size:
                    raise EditError(
                        f"edit of {name!r}, dim {dim}: the kept indices must be ascending, at least one, below {size}"
                    )
            shapes[name] = self.new_size(name)
        for path, values in self.attributes.items():
            for attribute, (before, after) in values.items():
                key = (path, attribute)
                found = attributes[key] if key in attributes else _get_attribute(model, path, attribute)
                if found != before:
                    raise EditError(f"edit of {path}.{attribute}: expected {before}, got {found}")
                attributes[key] = after

    def apply(self, model: nn.Module) -> list[Change]:
        """Carry the edit out on `model`, which `check` has passed."""
        changes: dict[int, Change] = {}
        tensors = dict(named_tensors(model))
        for name, dims in self.slices.items():
            tensor = tensors[name]
            if id(tensor) in changes:  # tied: cut once, seen under every name
                continue
            keep = {d: torch.tensor(indices, dtype=torch.long, device=tensor.device) for d, indices in dims.items()}
            changes[id(tensor)] = Change(tensor, tensor.shape, keep)
            grad = tensor.grad
            _set_data(tensor, _index(tensor.detach(), keep))
            if grad is not None:
                tensor.grad = _index(grad, keep)
        for path, values in self.attributes.items():
            for attribute, (_, after) in values.items():
                setattr(model.get_submodule(path), attribute, after)
        return list(changes.values())

    def revert(self, model: nn.Module) -> None:
        """Bring the shapes back to what they were before the edit; the values become zero."""
        tensors = dict(named_tensors(model))
        for name, size in self.sizes.items():
            if tuple(tensors[name].shape) != size:
                tensors[name].grad = None
                _set_data(tensors[name], tensors[name].detach().new_zeros(size))
        for path, values in self.attributes.items():
            for attribute, (before, _) in values.items():
                setattr(model.get_submodule(path), attribute, before)

    def to_json(self) -> dict[str, Any]:
        """The edit as JSON data; index lists that occur many times are written once."""
        pool: dict[tuple[int, ...], int] = {}
        slices = {
            name: {str(d): pool.setdefault(tuple(indices), len(pool)) for d, indices in dims.items()}
            for name, dims in self.slices.items()
        }
        return {
            "kind": self.kind,
            "indices": [list(indices) for indices in pool],
            "slices": slices,
            "sizes": {name: list(size) for name, size in self.sizes.items()},
            "attributes": {p: {a: list(pair) for a, pair in values.items()} for p, values in self.attributes.items()},
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Keep:
        """The inverse of `to_json`."""
        pool = [tuple(int(i) for i in indices) for indices in data["indices"]]
        return cls(
            slices={name: {int(d): pool[i] for d, i in dims.items()} for name, dims in data["slices"].items()},
            sizes={name: tuple(size) for name, size in data["sizes"].items()},
            attributes={
                path: {a: (_frozen(before), _frozen(after)) for a, (before, after) in values.items()}
                for path, values in data["attributes"].items()
            },
            origin=data["origin"],
        )


Edit = Keep  # becomes a union as methods bring their own kinds
EDIT_KINDS: Mapping[str, type[Edit]] = {Keep.kind: Keep}


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> list[Change]:
    """Change the structure of `model`, in order; all of the edits, or, if one does not fit, none.

    Parameters stay the same objects (their data is swapped, as `nn.Module.to` does), so optimizers, tied names and
    references that user code holds go on pointing at live tensors; state of the old shape is for the caller to cut
    with the returned changes.

    Args:
        model: the network whose tensor names the edits speak of; a trained one or a skeleton.
        edits: what to do.

    Returns:
        One `Change` for each edit and tensor, in order.

    Raises:
        EditError: an edit names a tensor that is not there, or that has another shape. Nothing was changed.
    """
    edits = list(edits)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    attributes: dict[tuple[str, str], Any] = {}
    for edit in edits:
        edit.check(shapes, model, attributes)
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
    """The edits that `model` has been through, oldest first."""
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


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, tied and non-persistent ones included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def skeleton(model: nn.Module, convert: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A copy of `model` with the same structure and history whose tensors hold no memory.

    Args:
        model: any network; it is not changed.
        convert: makes the copy's tensor from the original's; by default an empty one on the `meta` device.

    Returns:
        The copy. Ties between tensors are kept.

    Example:
        >>> skeleton(nn.Linear(2, 3)).weight.device
        device(type='meta')
    """
    convert = convert or (lambda tensor: torch.empty_like(tensor, device="meta"))
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in memo:
            new = convert(tensor.detach())
            memo[id(tensor)] = (
                nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
    return copy.deepcopy(model, memo)


def _index(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    dense = tensor.dim() in (4, 5) and not tensor.is_contiguous()
    for dim, indices in keep.items():
        tensor = tensor.index_select(dim, indices)
    if dense:  # index_select loses channels_last
        return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
    return tensor.clone() if not keep else tensor


def _set_data(tensor: Tensor, new: Tensor) -> None:
    # A live graph may still hold the gradient accumulator, which remembers the old shape. Torch drops it when the
    # dtype changes but not when the shape does, so the data passes through an empty tensor of another dtype.
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = new.new_empty(0, dtype=other)
    tensor.data = new


def _get_attribute(model: nn.Module, path: str, attribute: str) -> Any:
    try:
        value = getattr(model.get_submodule(path), attribute)
        return tuple(value) if isinstance(value, list) else value
    except AttributeError as error:
        raise EditError(f"edit of {path}.{attribute}: {error}; is it another architecture?") from error


def _frozen(value: Any) -> Attribute:
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else int(value)
