"""Keep: which slices of which tensors survive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress.edits.companions import ROLES
from lightning_compress.edits.structure import (
    Change,
    EditError,
    Replacement,
    index,
    named_tensors,
    refuse_quantized,
    set_data,
)

__all__ = ["Attribute", "Keep"]

Attribute = int | tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """Which indices of which dims of which tensors survive.

    Attributes:
        slices: tensor name -> dim -> surviving indices, ascending.
        sizes: the shape that each of those tensors must have before the edit.
        attributes: module name -> attribute -> (before, after), for sizes that modules hold in Python (`groups`).
        origin: the method that asked for it, for the report.

    Example:
        >>> from lightning_compress.edits import apply_edits, history
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
    lasting: ClassVar[bool] = True

    slices: Mapping[str, Mapping[int, tuple[int, ...]]]
    sizes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, tuple[Attribute, Attribute]]] = field(default_factory=dict)
    origin: str = ""

    def new_size(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` after the edit."""
        dims = self.slices[name]
        return tuple(len(dims[d]) if d in dims else size for d, size in enumerate(self.sizes[name]))

    def check(self, model: nn.Module) -> None:
        """Raise unless the edit fits."""
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
        for name, dims in self.slices.items():
            if name not in shapes:
                raise EditError(f"edit of {name!r}: the network has no such tensor; is it another architecture?")
            if shapes[name] != self.sizes[name]:
                raise EditError(
                    f"edit of {name!r}: expected shape {list(self.sizes[name])}, got {list(shapes[name])}; "
                    "was it applied before, or is this another architecture?"
                )
            refuse_quantized(model, name)
            for dim, indices in dims.items():
                size = self.sizes[name][dim] if dim < len(self.sizes[name]) else 0
                ordered = list(indices) == sorted(set(indices))
                if not indices or not ordered or indices[0] < 0 or indices[-1] >= size:
                    raise EditError(
                        f"edit of {name!r}, dim {dim}: the kept indices must be ascending, at least one, below {size}"
                    )
        for path, values in self.attributes.items():
            for attribute, (before, _) in values.items():
                found = _get_attribute(model, path, attribute)
                if found != before:
                    raise EditError(f"edit of {path}.{attribute}: expected {before}, got {found}")

    def apply(self, model: nn.Module) -> list[Change | Replacement]:
        """Carry the edit out on `model`, which `check` has passed."""
        changes: dict[int, Change] = {}
        tensors = dict(named_tensors(model))
        for name, dims in self.slices.items():
            tensor = tensors[name]
            for role in ROLES:
                beside = tensors.get(f"{name}_{role}")
                if beside is not None and tuple(beside.shape) == self.sizes[name]:
                    set_data(beside, index(beside, {d: torch.tensor(i, device=beside.device) for d, i in dims.items()}))
            if id(tensor) in changes:  # tied: cut once, seen under every name
                continue
            keep = {d: torch.tensor(indices, dtype=torch.long, device=tensor.device) for d, indices in dims.items()}
            changes[id(tensor)] = Change(tensor, tensor.shape, keep)
            grad = tensor.grad
            set_data(tensor, index(tensor.detach(), keep))
            if grad is not None:
                tensor.grad = index(grad, keep)
        for path, values in self.attributes.items():
            for attribute, (_, after) in values.items():
                setattr(model.get_submodule(path), attribute, after)
        return list(changes.values())

    def revert(self, model: nn.Module) -> None:
        """Bring the shapes back to what they were before the edit; the values become zero."""
        tensors = dict(named_tensors(model))
        for name, size in self.sizes.items():
            for other in (name, *(f"{name}_{role}" for role in ROLES if f"{name}_{role}" in tensors)):
                if tuple(tensors[other].shape) != size:
                    tensors[other].grad = None
                    set_data(tensors[other], tensors[other].detach().new_zeros(size))
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


def _get_attribute(model: nn.Module, path: str, attribute: str) -> Any:
    try:
        value = getattr(model.get_submodule(path), attribute)
        return tuple(value) if isinstance(value, list) else value
    except AttributeError as error:
        raise EditError(f"edit of {path}.{attribute}: {error}; is it another architecture?") from error


def _frozen(value: Any) -> Attribute:
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else int(value)
