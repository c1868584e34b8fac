"""Budgets and schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.budget import Budget, bisect
from lightning_compress.schedule import SCHEDULES


@pytest.mark.parametrize("value", [0, -1, 1.5, -0.5, "half", True, float("nan")])
def test_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Budget\(macs=\.\.\.\) must be a fraction in \(0, 1\]"):
        Budget(macs=value)


def test_empty() -> None:
    with pytest.raises(ValueError, match="at least one of macs, params, bytes, latency"):
        Budget()


def test_fractions_and_absolute_numbers() -> None:
    budget = Budget(macs=0.25, params=1000)
    assert budget.limits({"macs": 400.0, "params": 5000.0}) == {"macs": 100.0, "params": 1000.0}


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_on_the_way(fraction: float, share: float) -> None:
    dense = {"macs": 1000.0}
    between = Budget(macs=share).relaxed(fraction, dense)["macs"]
    assert 1000 * share - 1e-6 <= between <= 1000


@given(st.integers(0, 200), st.integers(0, 200))
def test_bisect_finds_the_smallest(threshold: int, high: int) -> None:
    assert bisect(lambda n: n >= threshold, 0, high) == (threshold if threshold <= high else None)


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.floats(0, 1), st.floats(0, 1))
def test_schedules_rise_and_end_at_one(name: str, a: float, b: float) -> None:
    schedule = SCHEDULES[name]
    low, high = sorted((a, b))
    assert 0 <= schedule(low) <= schedule(high) <= schedule(1.0) == 1
