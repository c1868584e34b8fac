"""Costs that only a measurement can tell: the bytes of the file, the latency on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import BudgetError, meant_as_share
from lightning_compress.calls import Call
from lightning_compress.coupling import Coupling, Settled
from lightning_compress.edits import apply_edits, rewind_edits, skeleton
from lightning_compress.latency import compare_latency
from lightning_compress.quiet import without_observers

__all__ = ["BUDGET_BATCH", "Stopwatch", "within_bytes", "within_latency"]

Propose = Callable[[Mapping[str, float]], Settled | None]
"""Costs allowed in closed form -> a proved edit that meets them; raises BudgetError where there is none."""

BUDGET_BATCH = 32
"""The batch size at which a budget's latency is meant: large enough that arithmetic is most of it."""

PROBES = 7
"""Steps of the search over multiply-accumulates: to within a hundredth of the dense network's."""


@dataclass(frozen=True)
class Stopwatch:
    """Times networks beside a reference, so that what disturbs the machine disturbs both.

    Attributes:
        reference: the network that fractions refer to.
        calls: what to time, brought to the batch size of budgets.
        microseconds: what the reference took when the budget was set; what `__call__` returns is in its currency.
    """

    reference: nn.Module
    calls: Sequence[Call]
    microseconds: float

    @classmethod
    def start(cls, reference: nn.Module, calls: Sequence[Call]) -> Stopwatch:
        """Time the reference."""
        times = compare_latency({"": (reference, calls)}, (BUDGET_BATCH,))
        return cls(reference, calls, times[""][BUDGET_BATCH].wall.median * 1e3)

    @classmethod
    def resume(cls, network: nn.Module, length: int, calls: Sequence[Call], microseconds: float) -> Stopwatch:
        """A stopwatch that was started before the network went through its newest edits.

        Args:
            network: the network now.
            length: how many edits it had been through then.
            calls: what to time.
            microseconds: what it took then.
        """
        with without_observers(network):
            reference = copy.deepcopy(network)
        rewind_edits(reference, length)
        return cls(reference, calls, microseconds)

    def __call__(self, network: nn.Module) -> float:
        """Microseconds of one batch of `BUDGET_BATCH`, in eager torch."""
        sides = {"reference": (self.reference, self.calls), "network": (network, self.calls)}
        times = compare_latency(sides, (BUDGET_BATCH,))
        found, expected = (times[side][BUDGET_BATCH].wall.median for side in ("network", "reference"))
        return self.microseconds * found / expected


def within_bytes(model: nn.Module, coupling: Coupling, propose: Propose, limits: Mapping[str, float]) -> Settled | None:
    """Meet a limit on the size of the file, which holds a header and the edits beside the tensors.

    Args:
        model: the network.
        coupling: its coupling.
        propose: makes proved edits.
        limits: unit -> cost allowed, `bytes` among them.

    Raises:
        BudgetError: there is no such network.
    """
    plain, dense = coupling.bytes(coupling.nothing_cut()), artifact_bytes(model)
    targets = {**limits, "bytes": limits["bytes"] + plain - dense}
    scale = max(1.0, plain / dense)  # where the file is entropy-coded, more than a byte has to go for each
    while True:  # ends: below what is reachable, `propose` raises
        try:
            settled = propose(targets)
        except BudgetError as error:
            raise BudgetError(
                f"a file of {limits['bytes']:,.0f} bytes cannot be met together with the other limits: beside the "
                f"tensors it holds a header and the edits, {limits['bytes'] - targets['bytes']:,.0f} bytes; for the "
                f"rest, {error}"
            ) from error
        if settled is None:
            return None
        with without_observers(model):
            trial = skeleton(model, lambda tensor: tensor)  # its own tensors are cut, the values are the network's
        apply_edits(trial, [settled.keep])
        excess = artifact_bytes(trial) - limits["bytes"]
        if excess <= 0:
            return settled
        targets["bytes"] -= excess * scale


def within_latency(
    model: nn.Module,
    coupling: Coupling,
    propose: Propose,
    limits: Mapping[str, float],
    stopwatch: Stopwatch,
    least: float,
) -> Settled | None:
    """Meet a limit on latency: search for the most multiply-accumulates that are fast enough, timing each candidate.

    Args:
        model: the network.
        coupling: its coupling.
        propose: makes proved edits.
        limits: unit -> cost allowed, `latency` in microseconds of the stopwatch among them.
        stopwatch: what to measure with.
        least: multiply-accumulates below which nothing can be proposed.

    Raises:
        BudgetError: the smallest network that can be reached is too slow.
    """
    limit = limits["latency"]
    others = {unit: value for unit, value in limits.items() if unit != "latency"}

    def timed(macs: float) -> tuple[Settled | None, float]:
        settled = propose({**others, "macs": min(macs, others.get("macs", macs))})
        with without_observers(model):
            trial = skeleton(model, lambda tensor: tensor)
        apply_edits(trial, [] if settled is None else [settled.keep])
        return settled, stopwatch(trial)

    high = coupling.macs(coupling.nothing_cut())
    best, time = timed(high)
    if time <= limit:
        return best
    best, lowest = timed(least)
    if lowest > limit:
        share = lowest / stopwatch.microseconds
        raise BudgetError(
            f"a latency of {limit:,.0f} us cannot be met: the dense network takes {stopwatch.microseconds:,.0f} us for "
            f"a batch of {BUDGET_BATCH} here, and the lowest reachable by cutting channels is "
            f"{lowest:,.0f} us ({share:.3f} of it); ask for more{meant_as_share('latency', limit)}"
        )
    low = least
    for _ in range(PROBES):
        middle = (low + high) / 2
        settled, time = timed(middle)
        low, high, best = (middle, high, settled) if time <= limit else (low, middle, best)
    return best
