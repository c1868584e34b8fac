"""How a network is called: the recorded arguments that every analysis runs the network on.

A Lightning user gives no `example_inputs`; what is traced, measured and calibrated on are `Call`s recorded from a
real step. Code that has plain tensors makes calls of them with `as_calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.budget import BudgetError
from lightning_compress.quiet import undisturbed

__all__ = ["Call", "as_calls", "batch_size", "explain_inputs", "resize_batch", "run_calls", "shown_inputs"]

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Call:
    """One call of a network, or of a submodule of it.

    Attributes:
        args: positional arguments; tensors with the batch first.
        kwargs: keyword arguments.
        path: dotted name of the submodule called; empty for the network itself.

    Example:
        >>> call = Call((torch.zeros(2, 3),), {"scale": 2.0})
        >>> call.map(lambda tensor: tensor[:1]).args[0].shape
        torch.Size([1, 3])
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

    Args:
        inputs: tensors of any shape, the batch first.

    Raises:
        TypeError: something that is no network's input.

    Example:
        >>> as_calls(torch.zeros(2, 3))[0].args[0].shape
        torch.Size([2, 3])
        >>> as_calls(None)
        Traceback (most recent call last):
        TypeError: `inputs` must be a tensor, a tuple of the network's arguments, or Calls, got NoneType
    """
    if isinstance(inputs, Call):
        return (inputs,)
    if isinstance(inputs, Tensor):
        return (Call((inputs,)),)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
        way_out = next((way for kind, way in _WAYS_OUT.items() if hasattr(inputs, kind)), "")
        raise TypeError(
            "`inputs` must be a tensor, a tuple of the network's arguments, or Calls, got "
            f"{type(inputs).__name__}{way_out}"
        )
    if inputs and all(isinstance(item, Call) for item in inputs):
        return tuple(inputs)
    return (Call(tuple(inputs)),)


# What things have that are easily taken for a batch, and what to do with them.
_WAYS_OUT = {
    "__array__": "; make a tensor of it with torch.from_numpy",
    "collate_fn": "; give a batch of it, without the labels: next(iter(loader))[0]",
    "keys": "; for arguments by name give Call((), {...})",
}


def explain_inputs(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Let a function of a `model` and `inputs` say so where the model cannot be called with the inputs at all.

    What fails inside of an analysis says little of what the user gave. If the network alone fails as well, the error
    gets a note of what it was called with.

    Args:
        function: with parameters `model` and `inputs`.

    Example:
        >>> @explain_inputs
        ... def look(model, inputs):
        ...     return run_calls(model, as_calls(inputs))
        >>> try:
        ...     look(nn.Linear(3, 2), torch.zeros(1, 5))
        ... except RuntimeError as error:
        ...     error.__notes__[0]
        'The network cannot be called with `inputs`, (float32[1, 5] on cpu). Give what it is called with: ...'
    """
    parameters = signature(function)

    @wraps(function)
    def explaining(*args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        given = parameters.bind(*args, **kwargs).arguments
        model = given["model"]
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a network, a torch.nn.Module, got {type(model).__name__}")
        try:
            return function(*args, **kwargs)
        except _FAILURES as error:
            # of a refused budget the network has run; of too little memory it would not again
            if not isinstance(error, BudgetError | torch.OutOfMemoryError) and _fails(model, given["inputs"]):
                error.add_note(_note(model, as_calls(given["inputs"])))
            raise

    return explaining


def _fails(model: nn.Module, inputs: Any) -> bool:
    """Whether a network fails when it is simply called."""
    try:
        calls = as_calls(inputs)
    except TypeError:
        return False  # says enough
    try:
        with undisturbed(model):
            run_calls(model, calls)
    except _FAILURES:
        return True
    return False


def _note(model: nn.Module, calls: Sequence[Call]) -> str:
    shown = shown_inputs([call.args for call in calls], [dict(call.kwargs) for call in calls])
    homes = {parameter.device for parameter in model.parameters()}
    inputs = {tensor.device for call in calls for tensor in call.tensors()}
    elsewhere = f", and it is on {', '.join(map(str, homes))}" if homes and inputs - homes else ""
    return (
        f"The network cannot be called with `inputs`, {shown}{elsewhere}. Give what it is called with: one tensor, or "
        "a tuple of its arguments, batch first, on its device."
    )


def shown_inputs(*arguments: Any) -> str:
    """What a network was called with, in short.

    Example:
        >>> shown_inputs((torch.zeros(2, 3), True))
        '(float32[2, 3] on cpu, bool)'
    """
    return f"({', '.join(map(_shown, pytree.tree_leaves(arguments)))})"


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return type(value).__name__


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
