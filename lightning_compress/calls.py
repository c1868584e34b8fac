"""How a network is called: the recorded arguments that every analysis runs the network on.

A Lightning user gives no `example_inputs`; what is traced, measured and calibrated on are `Call`s recorded from a
real step. Code that has plain tensors makes calls of them with `as_calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Call", "as_calls", "batch_size", "resize_batch", "run_calls"]


@dataclass(frozen=True)
class Call:
    """One call of a network, or of a submodule of it.

    Attributes:
        args: positional arguments; tensors with the batch first.
        kwargs: keyword arguments.
        path: dotted name of the submodule called; empty for the network itself.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with `function` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.path)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]


def as_calls(inputs: Tensor | Call | Sequence[Any]) -> tuple[Call, ...]:
    """Make calls of what users hold: one tensor, a tuple of positional arguments, one call or several.

    Example:
        >>> as_calls(torch.zeros(2, 3))[0].args[0].shape
        torch.Size([2, 3])
    """
    if isinstance(inputs, Call):
        return (inputs,)
    if isinstance(inputs, Tensor):
        return (Call((inputs,)),)
    if inputs and all(isinstance(item, Call) for item in inputs):
        return tuple(inputs)
    return (Call(tuple(inputs)),)


def run_calls(model: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """Run the calls in order and return their outputs; gradient and training mode are the caller's."""
    return [model.get_submodule(call.path)(*call.args, **call.kwargs) for call in calls]


def batch_size(calls: Sequence[Call]) -> int:
    """The batch size: the first dim that most of the tensors with at least two dims agree on; 1 if there is none."""
    sizes = [tensor.shape[0] for call in calls for tensor in call.tensors() if tensor.dim() >= 2]
    return max(set(sizes), key=sizes.count) if sizes else 1


def resize_batch(calls: Sequence[Call], size: int) -> tuple[Call, ...]:
    """The same calls at another batch size, by repeating samples or leaving some out.

    Tensors whose first dim is not the batch size are passed on as they are.

    Example:
        >>> resize_batch(as_calls(torch.arange(6.0).view(3, 2)), 4)[0].args[0][:, 0]
        tensor([0., 2., 4., 0.])
    """
    old = batch_size(calls)

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != old:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % old]

    return tuple(call.map(resize) for call in calls)
