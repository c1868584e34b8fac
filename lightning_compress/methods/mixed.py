"""Mixed precision: as many bits for each weight as a budget allows, where they are missed most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget, BudgetError
from lightning_compress.calls import Call, run_calls
from lightning_compress.container import ENTRY
from lightning_compress.edits import owner
from lightning_compress.grids import Grid
from lightning_compress.methods.allocation import Option, allocate
from lightning_compress.methods.coding import encode
from lightning_compress.methods.observers import steps_for
from lightning_compress.methods.quantization import BITS, integers, quantized_weights
from lightning_compress.methods.targets import TARGETS
from lightning_compress.quantized import scope_of
from lightning_compress.quiet import undisturbed, without_observers
from lightning_compress.waiting import following

__all__ = ["FLOAT_BITS", "Choices", "measure_bits", "share_bits"]

FLOAT_BITS = 32


@dataclass(frozen=True)
class Choices:
    """What each weight may become, and what that costs.

    Attributes:
        options: name of a weight -> bits, what the network's outputs lose when it alone has so few, and costs.
        rest: unit -> what everything else costs.
    """

    options: Mapping[str, Sequence[Option]]
    rest: Mapping[str, float]


def measure_bits(
    quantized: nn.Module, calls: Sequence[Call], macs: Mapping[str, float], value_bits: int, target: str
) -> Choices:
    """Measure what fewer bits cost and save, one weight at a time.

    Args:
        quantized: a quantized and calibrated copy of the network, all of whose weights have the most bits; it is left
            as it was.
        calls: calibration data.
        macs: name of a weight -> multiply-accumulates.
        value_bits: bits of values.
        target: one of `TARGETS`.
    """
    machine = TARGETS[target]
    options: dict[str, list[Option]] = {}
    with without_observers(quantized), undisturbed(quantized):
        wanted = _outputs(quantized, calls)
        for name, weight, step, grid in following(quantized_weights(quantized), "measuring bits of weights"):
            options[name] = []
            for bits in BITS:
                other = machine.weights(bits)
                new = step if other == grid else steps_for(weight, other, "mse")
                size = min(weight.numel(), len(encode(integers(weight, new, other))) + ENTRY)  # as the file has it
                error = 0.0
                if other != grid:
                    with _regridded(quantized, name, other, new):
                        error = _distance(wanted, _outputs(quantized, calls))
                costs = {"bytes": float(size), "bit_operations": macs[name] * bits * value_bits}
                options[name].append(Option(bits, error, costs))
    weights = sum(own[0].costs["bytes"] for own in options.values())
    return Choices(options, {"bytes": max(0.0, artifact_bytes(quantized) - weights), "bit_operations": 0.0})


def share_bits(choices: Choices, budget: Budget, dense: Mapping[str, float], reserve: float = 0.0) -> dict[str, int]:
    """Bits for each weight, within a budget, where they are missed most.

    Args:
        choices: what `measure_bits` found.
        budget: of `bytes`, those of the coded file, or of `bit_operations`: multiply-accumulates times bits of the
            weight times bits of the value; those of the network before have 32 and 32.
        dense: what the network cost before, in these units.
        reserve: bytes to stay below a budget of bytes by: what the file was larger than foreseen.

    Returns:
        Name of a weight -> bits.

    Raises:
        BudgetError: the budget cannot be met, with the lowest that can.
    """
    limits = budget.limits(dense)
    if "bytes" in limits:
        limits["bytes"] -= reserve
    options, rest = list(choices.options.values()), choices.rest
    try:
        chosen = allocate(options, rest, limits)
    except BudgetError as error:
        lowest = {u: rest[u] + sum(min(o.costs[u] for o in own) for own in options) for u in limits}
        told = ", ".join(f"{lowest[u]:,.0f} {u} ({lowest[u] / dense[u]:.3f} of the dense network)" for u in lowest)
        raise BudgetError(
            f"a budget of {budget.given()} cannot be met with weights of {BITS[-1]} bits: {told}"
        ) from error
    return {name: int(option.choice) for name, option in zip(choices.options, chosen, strict=True)}


def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    leaves = pytree.tree_leaves(run_calls(model, calls))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Squared error, relative to the variance over samples."""
    error = sum(float((a - b).square().sum()) for a, b in zip(wanted, got, strict=True))
    return error / max(sum(float((a - a.mean(0)).square().sum()) for a in wanted), 1e-30)


@contextmanager
def _regridded(model: nn.Module, name: str, grid: Grid, steps: Tensor) -> Iterator[None]:
    module, leaf = owner(model, name)
    scope, buffer = scope_of(module), module.get_buffer(f"{leaf}_step")
    assert scope is not None
    before, old = scope.weights[leaf], buffer.clone()
    scope.weights[leaf] = grid
    with torch.no_grad():
        buffer.copy_(steps)
        try:
            yield
        finally:
            scope.weights[leaf] = before
            buffer.copy_(old)
