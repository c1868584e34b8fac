"""What all edits share: their error, the traces they leave on tensors, and networks without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantized import scope_of

__all__ = [
    "Change",
    "EditError",
    "Replacement",
    "index",
    "named_tensors",
    "owner",
    "refuse_quantized",
    "renew",
    "set_data",
    "skeleton",
]


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
        return index(like, self.keep)


@dataclass(frozen=True)
class Replacement:
    """Parameters that took the place of others, for whoever holds the old ones (an optimizer).

    Attributes:
        old: the parameters that are no longer part of the network, in the module's order.
        new: those that do their work now, in the module's order.
    """

    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, tied and non-persistent ones included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and what it calls it.

    Example:
        >>> owner(nn.Sequential(nn.Linear(2, 3)), "0.weight")
        (Linear(in_features=2, out_features=3, bias=True), 'weight')
    """
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def refuse_quantized(model: nn.Module, name: str) -> None:
    """Raise if a tensor is in a layer that is quantized: its steps are those of the channels that it has.

    Raises:
        EditError: it is.
    """
    scope = scope_of(owner(model, name)[0])
    if scope is not None and (scope.weights or scope.folded):
        raise EditError(f"edit of {name!r}: its layer is quantized; quantization comes last, after every other method")


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


def renew(module: nn.Module, make: Callable[[Tensor], Tensor], leaf: str | None = None) -> None:
    """Give a module parameters of its own, made from those that it has and may share with another network.

    Args:
        module: the module; its parameters become other objects.
        make: makes the new values.
        leaf: only those that the modules inside of it call so; None: all.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and leaf in (None, name):
                part._parameters[name] = nn.Parameter(make(parameter.detach()))


def index(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The surviving indices of each dim, as a new tensor in the same memory format."""
    dense = tensor.dim() in (4, 5) and not tensor.is_contiguous()
    for dim, indices in keep.items():
        tensor = tensor.index_select(dim, indices)
    if dense:  # index_select loses channels_last
        return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
    return tensor.clone() if not keep else tensor


def set_data(tensor: Tensor, new: Tensor) -> None:
    """Give a tensor other data, of another shape if need be; it stays the same object."""
    # A live graph may still hold the gradient accumulator, which remembers the old shape. Torch drops it when the
    # dtype changes but not when the shape does, so the data passes through an empty tensor of another dtype.
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = new.new_empty(0, dtype=other)
    tensor.data = new
