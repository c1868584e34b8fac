"""Networks that compute with few numbers: calls of functions whose weights and results are rounded to a grid.

The code of a network stays as it is, functional calls included. Hooks at its modules say which module is running; a
`TorchFunctionMode` sees the functions that it calls, and counts them: the second `add` of `layer1.0` is the same place
in every run, in training and evaluation, on one sample or many. What is rounded where is plain data (`Scope`), put
there by the edit `Quantize`; step sizes and zero points are buffers beside it.

Rounding in training is "fake" quantization (Jacob et al. 2018, arXiv 1712.05877): the arithmetic is that of floats
which happen to be multiples of a step. The straight-through estimator passes gradients on to what was rounded, and step
sizes get gradients as in LSQ (Esser et al. 2020, arXiv 1902.08153), LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576) or
PACT (Choi et al. 2018, arXiv 1805.06085).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "WEIGHTED",
    "Calls",
    "Grid",
    "Rounding",
    "Scope",
    "enter_scopes",
    "function_name",
    "reset",
    "round_to",
    "scope_of",
    "using",
    "watch",
]

WEIGHTED = ("conv1d", "conv2d", "linear")
"""Functions whose second argument is a weight that may be quantized."""

Place = tuple[str, int]
"""Name of a function, and which of its calls within one call of the module."""


@dataclass(frozen=True)
class Grid:
    """Integers from `low` to `high`.

    Example:
        >>> Grid.signed(8), Grid.unsigned(4).levels
        (Grid(low=-127, high=127), 16)
    """

    low: int
    high: int

    @property
    def levels(self) -> int:
        """How many they are."""
        return self.high - self.low + 1

    @classmethod
    def signed(cls, bits: int) -> Grid:
        """Symmetric, without the lowest integer, so that a change of sign is a change of sign."""
        return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    @classmethod
    def unsigned(cls, bits: int) -> Grid:
        """From zero."""
        return cls(0, 2**bits - 1)


@dataclass
class Scope:
    """What is rounded while a module is the innermost one that is watched.

    Attributes:
        weights: name of a parameter of the module -> its grid; the buffer `NAME_step` has a step for each output.
        values: place -> grid of what the function returns; buffers `FUNCTION_NUMBER_step` and `_zero`.
        inputs: place -> grid of the function's first argument; buffers `FUNCTION_NUMBER_input_step` and `_zero`.
        folded: the module is a BatchNorm that a runtime folds into the layer before.
        hooks: what watches the module.
    """

    weights: dict[str, Grid] = field(default_factory=dict)
    values: dict[Place, Grid] = field(default_factory=dict)
    inputs: dict[Place, Grid] = field(default_factory=dict)
    folded: bool = False
    hooks: list[Any] = field(default_factory=list)

    def grids(self) -> Iterator[tuple[str, Grid]]:
        """Prefix of the buffers of every grid of values, and the grid."""
        for (name, number), grid in self.values.items():
            yield f"{name}_{number}", grid
        for (name, number), grid in self.inputs.items():
            yield f"{name}_{number}_input", grid


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
        if scope.weights and place[0] in WEIGHTED:
            args, kwargs = self.with_weight(module, scope, args, kwargs)
        if place in scope.inputs:
            grid = scope.inputs[place]
            args = (self.rounded(module, f"{place[0]}_{place[1]}_input", grid, args[0]), *args[1:])
        output = func(*args, **kwargs)
        grid_out = scope.values.get(place)
        if grid_out is None:
            return output
        return self.rounded(module, f"{place[0]}_{place[1]}", grid_out, output)

    def with_weight(
        self, module: nn.Module, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the rounded weight."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        for leaf, grid in scope.weights.items():
            if module._parameters.get(leaf) is weight and isinstance(weight, Tensor):
                new = self.rounded_weight(module, leaf, grid, weight)
                return ((args[0], new, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "weight": new})
        return args, kwargs

    def rounded_weight(self, module: nn.Module, leaf: str, grid: Grid, weight: Tensor) -> Tensor:
        """A weight on its grid."""
        return round_to(weight, _buffer(module, f"{leaf}_step"), None, grid, rule_of(module))

    def rounded(self, module: nn.Module, prefix: str, grid: Grid, value: Tensor) -> Tensor:
        """A value on its grid."""
        step, zero = _buffer(module, f"{prefix}_step"), _buffer(module, f"{prefix}_zero")
        return round_to(value, step, zero, grid, rule_of(module))


def rule_of(module: nn.Module) -> str:
    """How step sizes get their gradients; set by whoever trains them."""
    rule: str = module.__dict__.get("_quantization_rule", "lsq")
    return rule


def _buffer(module: nn.Module, name: str) -> Tensor:
    tensor = module._buffers[name]
    assert tensor is not None
    return tensor


def round_to(x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, rule: str = "lsq") -> Tensor:
    """Values on a grid: `(clamp(round(x / step) + zero, low, high) - zero) * step`, halves to even.

    Args:
        x: values, of any floating-point type; the arithmetic is that of single precision.
        step: one step, or one for each index of the first dim.
        zero: the integer that stands for zero, as a float; None: 0. It is rounded.
        grid: the integers.
        rule: gradient of the step: `lsq`, `lsq+` (that of the zero point as well), `pact` (of what is clipped only).

    Example:
        >>> round_to(torch.tensor([0.26, -0.74, 9.0]), torch.tensor(0.5), None, Grid.signed(3))
        tensor([ 0.5000, -0.5000,  1.5000])
    """
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        rounded: Tensor = _Round.apply(x, step, zero, grid, rule)
        return rounded
    return _on_grid(x.float(), step, zero, grid)[0].to(x.dtype)


def _on_grid(x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounded values, and the integers less the zero point."""
    if step.dim():
        step = step.view(-1, *[1] * (x.dim() - 1))
    offset = step.new_zeros(()) if zero is None else zero.detach().round()
    # Bounds less the zero point, so that nothing is added to what is rounded: x / step may be large.
    integers = (x / step).round_().clamp_(grid.low - offset, grid.high - offset)
    return integers * step, integers


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor | None, grid: Grid, rule: str) -> Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.grid, ctx.rule = grid, rule
        return _on_grid(x.float(), step, zero, grid)[0].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, step, zero = ctx.saved_tensors
        wide = step.view(-1, *[1] * (x.dim() - 1)) if step.dim() else step
        offset = step.new_zeros(()) if zero is None else zero.round()
        ratio = x.float() / wide
        integers = ratio.round().clamp_(ctx.grid.low - offset, ctx.grid.high - offset)
        inside = (ratio >= ctx.grid.low - offset - 0.5) & (ratio <= ctx.grid.high - offset + 0.5)
        through = gradient * inside
        for_step = for_zero = None
        if ctx.needs_input_grad[1]:
            outside = gradient.float() - through.float() if ctx.rule == "pact" else gradient.float()
            by_step = outside * integers if ctx.rule == "pact" else outside * (integers - ratio * inside)
            for_step = by_step.flatten(1).sum(1) if step.dim() else by_step.sum()
        if zero is not None and ctx.needs_input_grad[2] and ctx.rule == "lsq+":
            for_zero = -(gradient.float() - through.float()).sum() * step
        return through, for_step, for_zero, None, None


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


class _Enter:
    """A forward pre-hook, an object so that networks with it can be copied and pickled."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        calls = _active()
        if calls is not None and any(other is module for other, _ in calls.frames):
            reset()  # a run that was interrupted (Ctrl-C) never left it
            calls = _active()
        if calls is None:
            calls = Rounding()
            calls.__enter__()
            _ACTIVE.calls, _ACTIVE.outermost = calls, calls
        calls.frames.append((module, Counter()))


class _Leave:
    """A forward hook that is called after an error as well."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        calls = _active()
        if calls is None or not calls.frames:
            return
        calls.frames.pop()
        if not calls.frames:
            _stop(calls)


def reset() -> None:
    """No watched module runs: one that did has ended in what is no `Exception`, of which hooks are not told."""
    calls = _active()
    if calls is None:
        return
    calls.frames.clear()
    _stop(calls)


def _stop(calls: Calls) -> None:
    """End a mode that the outermost module has made; not one that somebody is `using`."""
    if getattr(_ACTIVE, "outermost", None) is calls:
        _ACTIVE.calls = _ACTIVE.outermost = None
        calls.__exit__(None, None, None)


def watch(module: nn.Module) -> list[Any]:
    """Tell the active `Calls` when a module runs.

    Returns:
        The handles of the hooks.
    """
    return [
        module.register_forward_pre_hook(_Enter()),
        module.register_forward_hook(_Leave(), always_call=True),
    ]


def enter_scopes(model: nn.Module, paths: Mapping[str, Any] | list[str]) -> list[Any]:
    """Watch modules; the handles of the hooks."""
    return [handle for path in paths for handle in watch(model.get_submodule(path))]


_NAMES: dict[Any, str] = {}


def function_name(func: Any) -> str:
    """What a function is called, whether as a function, a method or an operator, in place or not.

    Example:
        >>> [function_name(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__radd__, nn.functional.relu)]
        ['add', 'add', 'add', 'relu']
    """
    name = _NAMES.get(func)
    if name is None:
        name = getattr(func, "__name__", type(func).__name__).strip("_")
        if name in ("radd", "iadd", "rmul", "imul"):
            name = name[1:]
        name = {"concat": "cat", "concatenate": "cat", "relu6": "relu6"}.get(name, name)
        _NAMES[func] = name
    return name
