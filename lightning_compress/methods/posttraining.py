"""A network quantized after training: everything that a few hundred unlabelled inputs can do for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget, BudgetError, meant_as_share, require_budget
from lightning_compress.calls import Call, as_calls, explain_inputs
from lightning_compress.edits import Quantize, apply_edits, skeleton
from lightning_compress.methods.equalization import equalize
from lightning_compress.methods.mixed import FLOAT_BITS, measure_bits, share_bits
from lightning_compress.methods.observers import OBSERVERS
from lightning_compress.methods.patterns import matches, no_match, unmatched
from lightning_compress.methods.placement import Placement, find_places
from lightning_compress.methods.quantization import BITS, VALUE_BITS, calibrate, plan
from lightning_compress.methods.rounding import ROUNDINGS, fit_rounding
from lightning_compress.methods.targets import TARGETS, this_machine
from lightning_compress.quiet import without_observers
from lightning_compress.waiting import working
from lightning_compress.wording import require_choice

__all__ = ["Precision", "Prepared", "prepare", "quantize"]

ORIGIN = "quantization"

TRIES = 4
"""Times that bits are shared out anew because the file came out larger than foreseen."""


@dataclass(frozen=True)
class Precision:
    """How a network is to be quantized.

    Attributes:
        bits: of weights: 8, 4, 3 or 2; or pattern of parameter or module names -> bits, where the first that matches
            counts and weights that none matches get 8.
        value_bits: of the values between layers: 8 or 4.
        ends: whether the first and the last layer take part in fewer bits than 8. By default they do not: they hold few
            of the weights, and much of the accuracy.
        budget: of `bytes` or `bit_operations`: bits are shared out over weights instead, by what the outputs lose.
        observer: how the ranges of values are found: `minmax`, `percentile`, `mse`, `entropy`.
        rounding: of weights: to the `nearest`; `corrected`, with biases that take up what the means have moved; or
            `joint`, so that the error of a layer's outputs is least, and corrected.
        equalization: exchange scales between layers first.
        target: the processor that it will run on: `avx2`, `vnni`, `arm`, `gpu`; None: this machine's.
        exclude: patterns of parameter or module names that stay as they are.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Precision(bits=5)
        Traceback (most recent call last):
        ValueError: `bits` must be one of 8, 4, 3, 2, got 5
    """

    bits: int | Mapping[str, int] = 8
    value_bits: int = 8
    ends: bool = False
    budget: Budget | None = None
    observer: str = "mse"
    rounding: str = "joint"
    equalization: bool = False
    target: str | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for value in self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]:
            require_choice("bits", value, BITS)
        require_choice("value_bits", self.value_bits, VALUE_BITS)
        require_choice("observer", self.observer, tuple(OBSERVERS))
        require_choice("rounding", self.rounding, ROUNDINGS)
        require_choice("target", self.target, (None, *TARGETS))
        for name in ("ends", "equalization"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}")
        if self.budget is not None:
            require_budget(self.budget, "Budget(bytes=0.1)")
            self.budget.refuse("macs", "params", "latency")
            if self.bits != 8:
                raise ValueError(f"give either `bits` or `budget`, got bits={self.bits!r} and budget={self.budget!r}")

    @property
    def machine(self) -> str:
        """The target, said or found."""
        return self.target or this_machine()

    def patterns(self) -> tuple[str, ...]:
        """All patterns, each of which has to match something."""
        return (*self.exclude, *(self.bits if isinstance(self.bits, Mapping) else ()))

    def of(self, names: Sequence[str]) -> dict[str, int]:
        """Bits of each weight, in the order that data reaches them."""
        found = {}
        for place, name in enumerate(names):
            outer = place in (0, len(names) - 1) and not self.ends
            if isinstance(self.bits, Mapping):
                found[name] = next((bits for pattern, bits in self.bits.items() if matches(name, pattern)), 8)
            else:
                found[name] = 8 if outer else self.bits
        return found


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to be quantized.

    Attributes:
        edit: what is rounded where.
        state: the state dict that it has then.
        placement: where it is quantized, and what is left.
        bits: name of a weight -> bits.
        errors: path of a layer -> output error that is left, relative to the energy of the outputs.
        bytes: of the file that it makes.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prepared = quantize(net, torch.randn(32, 8), target="vnni")
        >>> prepared.bits, sorted(prepared.errors)
        ({'0.weight': 8, '2.weight': 8}, ['0', '2'])
    """

    edit: Quantize
    state: Mapping[str, Tensor]
    placement: Placement
    bits: Mapping[str, int]
    errors: Mapping[str, float] = field(default_factory=dict)
    bytes: float = 0.0

    def apply(self, model: nn.Module) -> None:
        """Set the tensors of a network that has been through `edit`."""
        model.load_state_dict(self.state)


def places(model: nn.Module, calls: Sequence[Call], precision: Precision) -> Placement:
    """Where a network is quantized.

    Raises:
        ValueError: a pattern matches nothing, or there is nothing to quantize.
    """
    nothing = unmatched(model, precision.patterns())
    if nothing is not None:
        raise ValueError(no_match(model, nothing))

    def excluded(name: str) -> str | None:
        found = [pattern for pattern in precision.exclude if matches(name, pattern)]
        return f"is excluded by pattern {found[0]!r}" if found else None

    placement = find_places(model, calls, excluded)
    if not placement.weights:
        why = "; ".join(f"{name} {reason}" for name, reason in list(placement.left.items())[:5])
        raise ValueError(f"there is no weight to quantize: {why or 'none has two dims'}")
    return placement


def check_data(calls: Sequence[Call]) -> None:
    """Raise unless there is something to calibrate on.

    Raises:
        ValueError: there is not.
    """
    if not any(tensor.numel() for call in calls for tensor in call.tensors()):
        raise ValueError("quantization needs calibration data, and the inputs hold none: give a few hundred of them")


def prepare(
    model: nn.Module, calls: Sequence[Call], precision: Precision, dense: Mapping[str, float] | None = None
) -> Prepared:
    """Quantize a copy of a network.

    Args:
        model: the network; it is not changed.
        calls: calibration data.
        precision: how.
        dense: what the network cost before, in the units of a budget.

    Raises:
        ValueError: nothing to quantize, or calibration data that is missing or not finite.
        BudgetError: a budget that cannot be met.
    """
    check_data(calls)
    placement = places(model, calls[:1], precision)
    with without_observers(model):
        original, trial = (skeleton(model, torch.clone) for _ in range(2))
    original.eval()
    if precision.equalization:
        for network in (original, trial):
            equalize(network, placement.pairs)
    if precision.budget is not None:
        assert dense is not None
        return _within(original, trial, placement, calls, precision, precision.budget, dense)
    return _finished(original, trial, placement, calls, precision, precision.of(placement.weights))


def _finished(
    original: nn.Module,
    trial: nn.Module,
    placement: Placement,
    calls: Sequence[Call],
    precision: Precision,
    bits: Mapping[str, int],
) -> Prepared:
    """With so many bits; `trial` is changed."""
    edit = plan(placement, bits, precision.value_bits, precision.machine, precision.ends, ORIGIN)
    apply_edits(trial, [edit])
    with working("calibrating: running the network on calibration data"):
        calibrate(trial, placement, calls, precision.observer)
    errors = fit_rounding(original, trial, calls, precision.rounding)
    return Prepared(edit, trial.state_dict(), placement, bits, errors, artifact_bytes(trial))


def _within(
    original: nn.Module,
    trial: nn.Module,
    placement: Placement,
    calls: Sequence[Call],
    precision: Precision,
    budget: Budget,
    dense: Mapping[str, float],
) -> Prepared:
    """With as many bits as a budget allows; the file of what comes out is held to it."""
    widest = skeleton(trial, torch.clone)
    most = dict.fromkeys(placement.weights, BITS[0])
    apply_edits(widest, [plan(placement, most, precision.value_bits, precision.machine, precision.ends, ORIGIN)])
    calibrate(widest, placement, calls, precision.observer)
    choices = measure_bits(widest, calls, placement.macs, precision.value_bits, precision.machine)
    limit, reserve = budget.limits(dense).get("bytes", float("inf")), 0.0
    for _ in range(TRIES):
        bits = share_bits(choices, budget, dense, reserve)
        prepared = _finished(original, skeleton(trial, torch.clone), placement, calls, precision, bits)
        if prepared.bytes <= limit:
            return prepared
        reserve += prepared.bytes - limit  # weights rounded together are coded less well than those foreseen
    raise BudgetError(
        f"a budget of {limit:,.0f} bytes cannot be met: the best file found has {prepared.bytes:,.0f}; ask for that "
        f"much, or take WeightSharing, whose files are smaller{meant_as_share('bytes', limit)}"
    )


@explain_inputs
def quantize(model: nn.Module, inputs: Tensor | Call | Sequence[Any], **precision: Any) -> Prepared:
    """Quantize a trained network, without training.

    Args:
        model: the network; it is changed in place, and computes with rounded weights and values from then on.
        inputs: a few hundred unlabelled inputs: a tensor, a tuple of arguments, or calls.
        precision: the attributes of `Precision`.

    Returns:
        What was done.

    Raises:
        ValueError: an argument out of range, nothing to quantize, or inputs that are not finite.
        BudgetError: a budget that cannot be met.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(256, 8)
        >>> before = net(x)
        >>> prepared = quantize(net, x)
        >>> prepared.edit.target == this_machine(), bool((net(x) - before).abs().max() < 0.05)
        (True, True)
    """
    asked = Precision(**precision)
    calls = as_calls(inputs)
    check_data(calls)
    dense = None if asked.budget is None else costs(model, places(model, calls[:1], asked))
    prepared = prepare(model, calls, asked, dense)
    apply_edits(model, [prepared.edit])
    prepared.apply(model)
    return prepared


def costs(model: nn.Module, placement: Placement) -> dict[str, float]:
    """What a network costs in the units of budgets, before it is quantized."""
    return {
        "bytes": float(artifact_bytes(model)),
        "bit_operations": sum(placement.macs.values()) * FLOAT_BITS**2,
    }


def regrid(prepared: Quantize, bits: Mapping[str, int]) -> Quantize:
    """The edit that gives quantized weights other bits."""
    machine = TARGETS[prepared.target]
    new = {name: machine.weights(count) for name, count in bits.items()}
    changed = {name: grid for name, grid in new.items() if grid != prepared.weights[name]}
    old = {name: prepared.weights[name] for name in changed}
    return replace(prepared, weights=changed, before=old, values={}, inputs={}, scopes=(), folded=())
