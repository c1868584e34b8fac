"""One budget for all layers: within it, refused only where it cannot be met, and close to the best that there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.budget import BudgetError
from lightning_compress.methods.allocation import Option, allocate, share_out

UNITS = ("macs", "params")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], dict[str, float], dict[str, float]]:
    """Layers with options, what the rest costs, and limits between nothing and all."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        dense = {unit: float(draw(st.integers(1, 100))) for unit in UNITS}
        options = [Option(None, 0.0, dense)]
        for number in range(draw(st.integers(0, 4))):
            costs = {unit: dense[unit] * draw(st.floats(0.05, 1.2)) for unit in UNITS}
            options.append(Option(number, draw(st.floats(0, 1)), costs))
        layers.append(options)
    rest = {unit: float(draw(st.integers(0, 50))) for unit in UNITS}
    units = draw(st.sampled_from([("macs",), ("params",), UNITS]))
    limits = {u: draw(st.floats(0.1, 1)) * (rest[u] + sum(o[0].costs[u] for o in layers)) for u in units}
    return layers, rest, limits


def cost(chosen: tuple[Option, ...] | list[Option], rest: dict[str, float], unit: str) -> float:
    return rest[unit] + sum(option.costs[unit] for option in chosen)


@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_limits_hold_or_are_refused(problem: tuple[list[list[Option]], dict[str, float], dict[str, float]]) -> None:
    layers, rest, limits = problem

    def fits(chosen: tuple[Option, ...] | list[Option], slack: float) -> bool:
        """Sums of floats are held to a limit with some slack: which way theirs were rounded is not what is tested."""
        return all(cost(chosen, rest, unit) <= limit * (1 + slack) for unit, limit in limits.items())

    every = list(itertools.product(*layers))
    try:
        chosen = allocate(layers, rest, limits)
    except BudgetError:
        if len(limits) == 1:  # with one unit the cheapest of each layer is the test; with several it may not be found
            assert not any(fits(candidate, 0) for candidate in every)
        return
    assert fits(chosen, 1e-9)
    assert all(any(option is other for other in layer) for option, layer in zip(chosen, layers, strict=True))
    # The relaxation is off by no more than its last step: one layer's whole error.
    fitting = [candidate for candidate in every if fits(candidate, 0)]
    best = min((sum(option.error for option in candidate) for candidate in fitting), default=math.inf)
    largest = max(option.error for layer in layers for option in layer)
    assert sum(option.error for option in chosen) <= best + (largest if len(limits) == 1 else len(layers)) + 1e-9


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_a_limit_that_holds_already_changes_nothing(
    problem: tuple[list[list[Option]], dict[str, float], dict[str, float]],
) -> None:
    layers, rest, limits = problem
    loose = dict.fromkeys(limits, 1000000000.0)
    assert [option.choice for option in allocate(layers, rest, loose)] == [None] * len(layers)


def test_the_layer_that_loses_least_gives_most() -> None:
    def layer(*pairs: tuple[float, float]) -> list[Option]:
        return [Option(place or None, error, {"macs": macs}) for place, (macs, error) in enumerate(pairs)]

    robust, fragile = layer((10, 0), (6, 0.01), (2, 0.02)), layer((10, 0), (6, 0.2), (2, 0.9))
    assert [option.choice for option in allocate([robust, fragile], {"macs": 0}, {"macs": 12})] == [2, None]
    assert [option.choice for option in share_out([robust, fragile], {"macs": 0}, {"macs": 12})] == [1, 1]


def test_the_refusal_says_the_lowest() -> None:
    options = [Option(None, 0.0, {"macs": 1000.0}), Option(1, 0.5, {"macs": 400.0})]
    for solve in (allocate, share_out):
        with pytest.raises(BudgetError, match=r"has 1,100, and the lowest reachable .* is 500 \(0\.455 of it\)"):
            solve([options], {"macs": 100.0}, {"macs": 300.0})
