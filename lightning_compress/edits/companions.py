"""Companions: tensors that live beside parameters while a network is trained, and say something of each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.edits.structure import Change, EditError, Replacement, named_tensors, owner, refuse_quantized

__all__ = ["ROLES", "Companions", "companion", "companions"]

ROLES: Mapping[str, torch.dtype] = {"mask": torch.uint8, "code": torch.int32, "latent": torch.float32}
"""What a companion says: whether a weight is alive; which of its layer's shared values it has; what it is a function
of, when that is what is trained."""


@dataclass(frozen=True)
class Companions:
    """Buffers that are put beside parameters: `weight_mask` beside `weight`, of the same shape.

    They are in checkpoints, so that a run that is resumed knows what it knew; they are cut when their parameters are;
    and they are left out of artifacts, where the weights say all. A new companion is zero.

    Attributes:
        role: one of `ROLES`.
        tensors: name of a parameter -> its shape.
        origin: the method that asked for it, for the report.

    Example:
        >>> from lightning_compress.edits import apply_edits
        >>> net = nn.Linear(2, 3)
        >>> _ = apply_edits(net, [Companions("mask", {"weight": (3, 2)})])
        >>> sorted(net.state_dict())
        ['bias', 'weight', 'weight_mask']
    """

    kind: ClassVar[str] = "companions"
    lasting: ClassVar[bool] = False

    role: str
    tensors: Mapping[str, tuple[int, ...]]
    origin: str = ""

    def check(self, model: nn.Module) -> None:
        """Raise unless the edit fits."""
        if self.role not in ROLES:
            raise EditError(f"companions must be one of {', '.join(ROLES)}, got {self.role!r}")
        tensors = dict(named_tensors(model))
        for name, shape in self.tensors.items():
            found = tensors.get(name)
            if not isinstance(found, nn.Parameter):
                raise EditError(f"edit of {name!r}: the network has no such parameter; is it another architecture?")
            if tuple(found.shape) != shape:
                raise EditError(f"edit of {name!r}: expected shape {list(shape)}, got {list(found.shape)}")
            refuse_quantized(model, name)
            if f"{name}_{self.role}" in tensors:
                raise EditError(f"edit of {name!r}: it has a {self.role} already")

    def apply(self, model: nn.Module) -> list[Change | Replacement]:
        """Carry the edit out on `model`, which `check` has passed."""
        for name in self.tensors:
            module, leaf = owner(model, name)
            parameter = module._parameters[leaf]
            assert parameter is not None
            new = torch.zeros_like(parameter.detach(), dtype=ROLES[self.role])
            module.register_buffer(f"{leaf}_{self.role}", new)
        return []

    def revert(self, model: nn.Module) -> None:
        """Take the companions away."""
        for name in self.tensors:
            module, leaf = owner(model, name)
            delattr(module, f"{leaf}_{self.role}")

    def to_json(self) -> dict[str, Any]:
        """The edit as JSON data."""
        tensors = {name: list(shape) for name, shape in self.tensors.items()}
        return {"kind": self.kind, "role": self.role, "tensors": tensors, "origin": self.origin}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Companions:
        """The inverse of `to_json`."""
        tensors = {name: tuple(int(side) for side in shape) for name, shape in data["tensors"].items()}
        return cls(data["role"], tensors, data["origin"])


def companion(model: nn.Module, name: str, role: str) -> Tensor | None:
    """The companion of a parameter, if it has one of that role."""
    module, leaf = owner(model, name)
    return module._buffers.get(f"{leaf}_{role}")


def companions(module: nn.Module) -> Iterator[str]:
    """The names of the companions that a module has itself: `weight_mask`."""
    for name in module._buffers:
        leaf, _, role = name.rpartition("_")
        if role in ROLES and isinstance(module._parameters.get(leaf), nn.Parameter):
            yield name
