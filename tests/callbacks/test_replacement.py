"""The callbacks that replace layers: a few at a time, in any unit; what is wrong is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress import Budget, CompactFilters, Distillation, LowRankFactorization
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD, BlockMSE
from lightning_compress.edits import Replace, history
from lightning_compress.footprint import measure
from lightning_compress.layers import Chain
from lightning_compress.methods.measured import Stopwatch
from tests.contract.runs import Task, fit, task

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")


def replaced(module: Task) -> list[list[str]]:
    return [list(edit.layers) for edit in history(module.net) if isinstance(edit, Replace)]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LowRankFactorization, {}, "give either `budget` or `rank`"),
        (LowRankFactorization, {"budget": 0.5}, r"`budget` must be a Budget, e\.g\. Budget\(macs=0\.5\), got 0\.5"),
        (LowRankFactorization, {"rank": "energy:2"}, "energy:X with X in"),
        (LowRankFactorization, {"rank": 2, "decomposition": "svd"}, "`decomposition` must be one of"),
        (LowRankFactorization, {"rank": 2, "allocation": "even"}, "`allocation` must be one of greedy, uniform"),
        (LowRankFactorization, {"rank": 2, "samples": 0}, "`samples` must be an integer of at least 1, got 0"),
        (LowRankFactorization, {"rank": 2, "init": "zeros"}, "`init` must be one of data, weights, random"),
        (LowRankFactorization, {"rank": 2, "steps": 0}, "`steps` must be an integer of at least 1"),
        (CompactFilters, {"operator": "mobile"}, "`operator` must be one of depthwise_separable"),
        (CompactFilters, {"options": {"ratio": 2}}, "'depthwise_separable' has no option `ratio`; it has rank"),
        (CompactFilters, {"operator": "ghost", "options": {"ratio": 1}}, "`ratio` must be"),
        (
            CompactFilters,
            {"operator": "circulant", "options": {"block": 1.5}},
            "`block` must be an integer of at least 2",
        ),
        (CompactFilters, {"operator": "hashed", "options": {"block": 4}}, "has no option `block`; it has ratio, seed"),
        (CompactFilters, {"budget": "half"}, "`budget` must be a Budget"),
    ],
)
def test_bad_arguments(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (LowRankFactorization(rank={"a.9.9": 3}), r"`rank` of 'a\.9\.9': there is no such layer"),
        (LowRankFactorization(rank={"a.0.0": 999}), r"`rank` 999 of layer 'a\.0\.0' is not possible: at most 48"),
        (LowRankFactorization(Budget(macs=0.5), exclude=["sterm"]), "'sterm' matches no module; near names: stem"),
        (CompactFilters(exclude=["*"]), "no layer in this network that could be replaced"),
    ],
)
def test_what_depends_on_the_network_is_refused_before_training(
    callback: L.Callback, message: str, tmp_path: Path
) -> None:
    module = task("residual")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, callback)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_few_layers_at_a_time(tmp_path: Path) -> None:
    """Without a budget: in the order that data reaches them, each once, all by the end."""
    module = task("residual")
    fit(module, tmp_path, CompactFilters(start=0, end=3, steps=4, schedule="linear", samples=32))
    assert replaced(module) == [["a.0.0"], ["a.1"], ["b.0.0"], ["b.1"]]
    module = task("residual")
    fit(module, tmp_path, LowRankFactorization(rank=2, start=0, end=1, steps=2, schedule="linear", samples=32))
    first, second = replaced(module)
    assert len(first) >= len(second)
    assert not set(first) & set(second)
    assert isinstance(module.net.get_submodule(first[0]), Chain)


def test_ranks_fall_from_edit_to_edit(tmp_path: Path) -> None:
    module = task("residual")
    callback = LowRankFactorization(Budget(macs=0.4), start=0, end=2, steps=3, schedule="linear", samples=32)
    fit(module, tmp_path, callback)
    edits = replaced(module)
    assert len(edits) == 3
    assert set(edits[0]) & set(edits[2])
    assert callback.errors.keys() >= set(edits[2])


def test_the_budget_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts parameters."""

    def count(network: nn.Module) -> float:
        return float(sum(parameter.numel() for parameter in network.parameters()))

    monkeypatch.setattr(Stopwatch, "start", classmethod(lambda cls, model, calls: cls(model, calls, count(model))))
    monkeypatch.setattr(Stopwatch, "__call__", lambda self, network: count(network))
    monkeypatch.setattr(
        "lightning_compress.methods.planning.time_candidates",
        lambda _, layers, __, candidates: {
            layer.path: {
                None: float(layer.weight.numel()),
                **{c.rank: float(c.rank * 10) for c in candidates[layer.path]},
            }
            for layer in layers
        },
    )
    module = task("residual")
    dense = count(module.net)
    fit(module, tmp_path, LowRankFactorization(Budget(latency=0.7), start=1, end=1, samples=32))
    assert count(module.net) <= 0.7 * dense


def test_taught_by_itself_with_hints_on_what_is_replaced(tmp_path: Path) -> None:
    """The hint hangs on a layer that becomes another: it goes on being heard, and means what it meant."""
    losses = {"kd": KD(temperature=2.0), "block": Term(BlockMSE(), 0.5, student="a.1", teacher="a.1")}
    teaching = Distillation("self", losses)
    module = task("residual")
    trainer = fit(module, tmp_path, teaching, CompactFilters("ghost", start=1, end=1, samples=32))
    assert "a.1" in replaced(module)[0]
    heard = {name for name in trainer.callback_metrics if "block" in name}
    assert heard
    assert all(torch.isfinite(trainer.callback_metrics[name]) for name in heard)


@pytest.mark.parametrize("operator", ["ghost", "fire", "grouped_shuffle", "crelu", "rotated", "circulant", "hashed"])
def test_every_operator_trains_and_resumes(operator: str, tmp_path: Path) -> None:
    module = task("residual")
    dense = measure(module.net, torch.zeros(2, 1, 8, 8))
    callback = CompactFilters(operator, start=1, end=1, samples=32)
    fit(module, tmp_path, callback)
    assert replaced(module)
    after = measure(module.net, torch.zeros(2, 1, 8, 8))
    assert after.params < dense.params
    resumed = task("residual")
    again = CompactFilters(operator, start=1, end=1, samples=32)
    fit(resumed, tmp_path / "again", again, ckpt=tmp_path / "epoch=2.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
