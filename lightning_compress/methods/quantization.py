"""Quantization: grids for the weights and values of a trained network, from a few hundred unlabelled inputs.

`plan` says what is rounded to which integers, as an edit; `calibrate` finds the steps. What more data can do (exchange
scales between layers, choose which way each weight is rounded, correct biases, share out bits) is in `rounding`,
`equalization` and `mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, run_calls
from lightning_compress.edits import Quantize
from lightning_compress.grids import Grid, round_to
from lightning_compress.methods.observers import OBSERVERS, Seen, grid_for, steps_for
from lightning_compress.methods.placement import Placement
from lightning_compress.methods.targets import TARGETS
from lightning_compress.quantized import Rounding, scope_of, using
from lightning_compress.quiet import undisturbed, without_observers
from lightning_compress.wording import require_choice

__all__ = [
    "BITS",
    "VALUE_BITS",
    "calibrate",
    "integers",
    "plan",
    "quantization_buffers",
    "quantized_weights",
    "set_steps",
    "settle",
]

BITS = (8, 4, 3, 2)
"""Of weights."""

VALUE_BITS = (8, 4)


def plan(
    placement: Placement, bits: Mapping[str, int], value_bits: int, target: str, ends: bool, origin: str
) -> Quantize:
    """The edit that quantizes a network.

    Args:
        placement: where.
        bits: name of a weight -> its bits.
        value_bits: bits of values between layers.
        target: one of `TARGETS`.
        ends: whether the first layer's input and what the last layer gets have so few bits, too; else 8.
        origin: of the edit.
    """
    machine = TARGETS[target]
    grid, wide = machine.values(value_bits), machine.values(8)
    last = placement.values[-1:] if not ends else ()
    return Quantize(
        weights={name: machine.weights(bits[name]) for name in placement.weights},
        values={site: wide if site in last else grid for site in placement.values},
        inputs=dict.fromkeys(placement.inputs, grid if ends else wide),
        scopes=placement.scopes,
        folded=tuple(placement.folded),
        target=target,
        origin=origin,
    )


def calibrate(
    model: nn.Module, placement: Placement, calls: Sequence[Call], observer: str = "mse", weights: str = "mse"
) -> None:
    """Set the steps and zero points of a network that was quantized, from what its values are without rounding.

    Args:
        model: the network, with a `Quantize` in its history; its buffers are set.
        placement: where it is quantized.
        calls: calibration data.
        observer: how ranges of values are found, one of `OBSERVERS`.
        weights: how steps of weights are found, `minmax` or `mse`.

    Raises:
        ValueError: no data, values that are not finite, or one that never comes up; the message names it.
    """
    if not calls:
        raise ValueError("quantization needs calibration data, and the inputs hold none: give a few hundred of them")
    require_choice("observer", observer, OBSERVERS)
    set_steps(model, weights)
    observing = _Observing(model)
    with without_observers(model), undisturbed(model), using(observing):
        run_calls(model, calls)
    ceilings = {(path, f"{name}_{number}"): limit for (path, name, number), limit in placement.limits.items()}
    for path, module in model.named_modules():
        scope = scope_of(module)
        for prefix, grid in scope.grids() if scope is not None else ():
            seen = observing.seen.get((path, prefix))
            if seen is None:
                raise ValueError(f"{path or 'the network'}: its {prefix} never comes up on the calibration data")
            step, zero = grid_for(seen, grid, observer, ceilings.get((path, prefix)))
            _fill(module, f"{prefix}_step", step)
            _fill(module, f"{prefix}_zero", zero)


def set_steps(model: nn.Module, observer: str = "mse", only: Callable[[str], bool] = lambda _: True) -> None:
    """Set the steps of quantized weights.

    Args:
        model: the network.
        observer: `minmax` or `mse`.
        only: whether the weight of a name is set.
    """
    for name, weight, step, grid in quantized_weights(model):
        if only(name):
            with torch.no_grad():
                step.copy_(steps_for(weight, grid, observer))


def quantized_weights(model: nn.Module) -> list[tuple[str, nn.Parameter, Tensor, Grid]]:
    """Name, weight, its steps and its grid, for all weights that are quantized."""
    found = []
    for path, module in model.named_modules():
        scope = scope_of(module)
        for leaf, grid in scope.weights.items() if scope is not None else ():
            weight, step = module._parameters[leaf], module._buffers[f"{leaf}_step"]
            assert weight is not None
            assert step is not None
            found.append((f"{path}.{leaf}".lstrip("."), weight, step, grid))
    return found


def integers(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """What a weight is in integers, int8.

    Example:
        >>> integers(torch.tensor([[0.4, -2.0]]), torch.tensor([0.5]), Grid.signed(2))
        tensor([[ 1, -1]], dtype=torch.int8)
    """
    wide = step.view(-1, *[1] * (weight.dim() - 1))
    return (weight.detach().float() / wide).round().clamp(grid.low, grid.high).to(torch.int8)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Let quantized weights, and zero points, be what they are rounded to."""
    for _, weight, step, grid in quantized_weights(model):
        weight.copy_(round_to(weight, step, None, grid))
    for module in model.modules():
        scope = scope_of(module)
        for prefix, _ in scope.grids() if scope is not None else ():
            zero = module._buffers[f"{prefix}_zero"]
            assert zero is not None
            zero.round_()


def quantization_buffers(model: nn.Module) -> Iterator[str]:
    """The names of the steps and zero points that quantization has brought."""
    for path, module in model.named_modules():
        scope = scope_of(module)
        if scope is not None:
            for prefix, _ in scope.grids():
                yield from (f"{path}.{prefix}_{what}".lstrip(".") for what in ("step", "zero"))
            yield from (f"{path}.{leaf}_step".lstrip(".") for leaf in scope.weights)


class _Observing(Rounding):
    """Rounds nothing, and looks at what would be rounded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[tuple[str, str], Seen] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}

    def with_weight(self, module: nn.Module, scope: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """See `Rounding`."""
        return args, kwargs

    def rounded(self, module: nn.Module, prefix: str, grid: Grid, value: Tensor) -> Tensor:
        """See `Rounding`."""
        key = self._paths[id(module)], prefix
        try:
            self.seen.setdefault(key, Seen()).add(value)
        except ValueError as error:
            raise ValueError(f"{key[0] or 'the network'}: {prefix}: {error}") from error
        return value


def _fill(module: nn.Module, name: str, value: float) -> None:
    buffer = module._buffers[name]
    assert buffer is not None
    with torch.no_grad():
        buffer.fill_(value)
