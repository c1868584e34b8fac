"""Budgets of latency, with a stopwatch that counts instead of timing: tests do not depend on a clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.budget import Budget, BudgetError
from lightning_compress.callbacks.pruning import ChannelPruning
from lightning_compress.footprint import measure
from lightning_compress.methods import measured
from lightning_compress.methods.pruning import prune_channels
from tests.contract.nets import NETS
from tests.contract.runs import fit, task

X = torch.zeros(2, 1, 8, 8)


class Counter(measured.Stopwatch):
    """A machine on which half of the time is overhead and half goes with the multiply-accumulates."""

    @classmethod
    def start(cls, reference: nn.Module, calls: object) -> Counter:
        return cls(reference, calls, 1000.0)  # type: ignore[arg-type]

    def __call__(self, network: nn.Module) -> float:
        return 500 + 500 * measure(network, X).macs / measure(self.reference, X).macs


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("pruning", "measured"):
        monkeypatch.setattr(f"lightning_compress.methods.{place}.Stopwatch", Counter)
    monkeypatch.setattr("lightning_compress.callbacks.pruning.Stopwatch", Counter)


@pytest.mark.parametrize("budget", [Budget(latency=0.75), Budget(latency=750)])
def test_the_most_that_is_fast_enough_is_kept(budget: Budget) -> None:
    model = NETS["residual"]()
    before = measure(model, X).macs
    prune_channels(model, X, budget)
    assert 0.47 < measure(model, X).macs / before <= 0.5


def test_other_limits_hold_as_well() -> None:
    model = NETS["residual"]()
    before = measure(model, X)
    prune_channels(model, X, Budget(latency=0.9, params=0.4))
    assert measure(model, X).params <= 0.4 * before.params


def test_nothing_is_cut_when_it_is_fast_enough() -> None:
    assert prune_channels(NETS["residual"](), X, Budget(latency=1.0)).proof == "nothing cut"


def test_what_pruning_cannot_make_faster_is_refused_with_the_lowest() -> None:
    with pytest.raises(
        BudgetError, match=r"latency of 400 us cannot be met: .* 1,000 us .* lowest reachable .* is 5\d\d us"
    ):
        prune_channels(NETS["residual"](), X, Budget(latency=0.4))


def test_in_a_run_the_reference_is_the_dense_network(tmp_path: Path) -> None:
    module = task("residual")
    before = measure(module.net, X).macs
    fit(module, tmp_path, ChannelPruning(Budget(latency=0.75), start=1, end=3, steps=2, samples=32))
    assert 0.47 < measure(module.net, X).macs / before <= 0.5
