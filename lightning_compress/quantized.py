"""Networks that compute with few numbers: calls of functions whose weights and results are rounded to a grid.

The code of a network stays as it is, functional calls included. Its modules say when they are running; a
`TorchFunctionMode` sees the functions that it calls, and counts them: the second `add` of `layer1.0` is the same place
in every run, in training and evaluation, on one sample or many. What is rounded where is plain data (`Scope`), put
there by the edit `Quantize`; step sizes and zero points are buffers beside it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_compress.grids import Grid, round_to

__all__ = [
    "TRANSPOSED",
    "WEIGHTED",
    "Calls",
    "Rounding",
    "Scope",
    "function_name",
    "input_prefix",
    "scope_of",
    "unwatch",
    "using",
    "watch",
    "watching",
]

WEIGHTED = ("conv1d", "conv2d", "linear")
"""Functions whose second argument is a weight that may be quantized."""

TRANSPOSED = ("conv_transpose1d", "conv_transpose2d")
"""Their transposes: of a weight that is quantized they see the rounded one, though runtimes compute them on floats."""

_WITH_WEIGHT = frozenset((*WEIGHTED, *TRANSPOSED))

Place = tuple[str, int]
"""Name of a function, and which of its calls within one call of the module."""


Argument = tuple[str, int, int]
"""Name of a function, which of its calls, which of the tensors that it gets."""


def input_prefix(argument: Argument) -> str:
    """Of the buffers of an argument."""
    return f"{argument[0]}_{argument[1]}_input{argument[2]}"


@dataclass
class Scope:
    """What is rounded while a module is the innermost one that is watched.

    Attributes:
        weights: name of a parameter of the module -> its grid; the buffer `NAME_step` has a step for each output.
        values: place -> grid of what the function returns; buffers `FUNCTION_NUMBER_step` and `_zero`.
        inputs: argument -> its grid; buffers `FUNCTION_NUMBER_inputWHICH_step` and `_zero`.
        folded: the module is a BatchNorm that a runtime folds into the layer before.
    """

    weights: dict[str, Grid] = field(default_factory=dict)
    values: dict[Place, Grid] = field(default_factory=dict)
    inputs: dict[Argument, Grid] = field(default_factory=dict)
    folded: bool = False

    def grids(self) -> Iterator[tuple[str, Grid]]:
        """Prefix of the buffers of every grid of values, and the grid."""
        for (name, number), grid in self.values.items():
            yield f"{name}_{number}", grid
        for argument, grid in self.inputs.items():
            yield input_prefix(argument), grid


def scope_of(module: nn.Module) -> Scope | None:
    """What is rounded in a module."""
    return module.__dict__.get("_quantization")


class Calls(TorchFunctionMode):
    """Sees the functions that watched modules call; what comes of a call is for subclasses to say.

    While one is active (`using`), entering a watched module adds a frame to it; otherwise the outermost watched module
    makes a `Rounding` for the time that it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[nn.Module, Counter[str]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.frames:
            return func(*args, **kwargs)
        name = function_name(func)
        if name in _WITH_WEIGHT:
            args, kwargs = _in_order(args, kwargs)
        module, counts = self.frames[-1]
        number = counts[name]
        counts[name] += 1
        return self.call(module, (name, number), func, args, kwargs)

    def call(
        self, module: nn.Module, place: Place, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do what one call does."""
        return func(*args, **kwargs)


class Rounding(Calls):
    """Rounds what scopes say is rounded."""

    def call(
        self, module: nn.Module, place: Place, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `Calls`."""
        scope = scope_of(module)
        if scope is None:
            return func(*args, **kwargs)
        if scope.weights and place[0] in _WITH_WEIGHT:
            args, kwargs = self.with_weight(module, scope, args, kwargs)
        if scope.inputs:
            args, kwargs = self.with_inputs(module, scope, place, args, kwargs)
        output = func(*args, **kwargs)
        grid_out = scope.values.get(place)
        if grid_out is None:
            return output
        return self.rounded(module, f"{place[0]}_{place[1]}", grid_out, output)

    def with_weight(
        self, module: nn.Module, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the rounded weight."""
        for leaf, grid in scope.weights.items():
            weight = module._parameters[leaf]
            if weight is not None and len(args) > 1 and args[1] is weight:
                return (args[0], self.rounded_weight(module, leaf, grid, weight), *args[2:]), kwargs
        return args, kwargs

    def with_inputs(
        self, module: nn.Module, scope: Scope, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with those rounded that have a grid."""
        wanted = {which: grid for (*own, which), grid in scope.inputs.items() if tuple(own) == place}
        if not wanted:
            return args, kwargs
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for which, grid in wanted.items():
            position = tensors[which]
            leaves[position] = self.rounded(module, input_prefix((*place, which)), grid, leaves[position])
        new: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, structure)
        return new

    def rounded_weight(self, module: nn.Module, leaf: str, grid: Grid, weight: Tensor) -> Tensor:
        """A weight on its grid."""
        return round_to(weight, _buffer(module, f"{leaf}_step"), None, grid, rule_of(module))

    def rounded(self, module: nn.Module, prefix: str, grid: Grid, value: Tensor) -> Tensor:
        """A value on its grid."""
        step, zero = _buffer(module, f"{prefix}_step"), _buffer(module, f"{prefix}_zero")
        return round_to(value, step, zero, grid, rule_of(module))


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer's function, by position."""
    rest, found = dict(kwargs), list(args)
    for name in ("input", "weight", "bias")[len(args) :]:
        if name not in rest:
            break
        found.append(rest.pop(name))
    return tuple(found), rest


def rule_of(module: nn.Module) -> str:
    """How step sizes get their gradients; set by whoever trains them."""
    rule: str = module.__dict__.get("_quantization_rule", "lsq")
    return rule


def _buffer(module: nn.Module, name: str) -> Tensor:
    tensor = module._buffers[name]
    assert tensor is not None
    return tensor


_ACTIVE = threading.local()


def _active() -> Calls | None:
    """Who is told what runs."""
    calls: Calls | None = getattr(_ACTIVE, "calls", None)
    return calls


@contextmanager
def using(calls: Calls) -> Iterator[Calls]:
    """Let watched modules tell `calls` of what they call, inside of the block."""
    before = _active()
    _ACTIVE.calls = calls
    try:
        with calls:
            yield calls
    finally:
        _ACTIVE.calls = before


def watch(module: nn.Module) -> None:
    """Tell the active `Calls` when a module runs; without one, round what its scope says.

    The instance gets a `forward` of its own, not hooks: those are not told when a run ends in an interrupt.
    """
    module.__dict__["forward"] = partial(_watched, module, module.__dict__.get("forward"))


def unwatch(module: nn.Module) -> None:
    """Undo `watch`."""
    watched = module.__dict__.pop("forward")
    if watched.args[1] is not None:  # it had a `forward` of its own before
        module.__dict__["forward"] = watched.args[1]


def _watched(module: nn.Module, forward: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a watched module."""
    calls = _active()
    if calls is None:
        with using(Rounding()):
            return _watched(module, forward, *args, **kwargs)
    calls.frames.append((module, Counter()))
    try:
        return type(module).forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)
    finally:
        calls.frames.pop()


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Watch modules, inside of the block."""
    modules = list(modules)
    for module in modules:
        watch(module)
    try:
        yield
    finally:
        for module in modules:
            unwatch(module)


_NAMES: dict[Any, str] = {}


def function_name(func: Any) -> str:
    """What a function is called, whether as a function, a method or an operator, in place or not.

    Example:
        >>> import torch
        >>> [function_name(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__radd__, nn.functional.relu)]
        ['add', 'add', 'add', 'relu']
    """
    name = _NAMES.get(func)
    if name is None:
        name = getattr(func, "__name__", type(func).__name__).strip("_")
        if name in ("radd", "iadd", "rmul", "imul"):
            name = name[1:]
        name = {"concat": "cat", "concatenate": "cat"}.get(name, name)
        _NAMES[func] = name
    return name
