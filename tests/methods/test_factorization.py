"""Networks factorized in closed form: budgets met, everything else as it was, and what cannot be replaced named."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from lightning_compress.artifact import load_compressed, save_compressed
from lightning_compress.budget import Budget, BudgetError
from lightning_compress.calls import Call, as_calls
from lightning_compress.edits import Replace, apply_edits, history
from lightning_compress.footprint import measure
from lightning_compress.methods import planning
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.factorization import factorize
from lightning_compress.methods.filters import compact_filters
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.pruning import prune_channels
from lightning_compress.methods.replaceable import find_layers
from tests.contract.nets import NETS
from tests.networks import RandomNetwork, block, classifier, networks, randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")

X = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CALLS = tuple(call for chunk in X.split(32) for call in as_calls(chunk))


def net(name: str = "residual", seed: int = 0) -> nn.Module:
    """Random weights, and statistics that are those of the data: as a trained network has them."""
    torch.manual_seed(seed)
    model = randomize(NETS[name](), seed).eval()
    reestimate_batchnorm(model, CALLS)
    return model


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / (b - b.mean(0)).norm())


@pytest.mark.parametrize("decomposition", ["spatial", "channel", "tucker", "cp"])
@pytest.mark.parametrize("name", NETS)
def test_budget_is_met_and_costs_are_those_measured(name: str, decomposition: str) -> None:
    model = net(name)
    dense = measure(model, X)
    done = factorize(model, X[:4], Budget(macs=0.7), decomposition=decomposition, calibration=CALLS)
    after = measure(model, X)
    assert done.costs["macs"] == (dense.macs, after.macs)
    assert done.costs["params"] == (dense.params, after.params)
    assert after.macs <= 0.7 * dense.macs
    assert set(done.ranks) == set(done.errors) == {path for edit in done.edits for path in edit.layers}  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", [{"params": 0.5}, {"bytes": 0.6}, {"macs": 0.6, "params": 0.6}])
def test_other_units(budget: dict[str, float]) -> None:
    model = net("plain")
    dense = measure(model, X)
    factorize(model, X[:4], Budget(**budget), calibration=CALLS)
    after = measure(model, X)
    for unit, fraction in budget.items():
        assert getattr(after, unit) <= fraction * getattr(dense, unit)


def test_data_beats_weights_beats_nothing() -> None:
    """At the output of the whole network, on other data than that of the calibration."""
    other = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = outputs(net(), other)
    found = {}
    for init in ("data", "weights", "random"):
        model = net()
        factorize(model, X[:4], Budget(macs=0.6), init=init, calibration=CALLS)  # type: ignore[arg-type]
        found[init] = distance(outputs(model, other), wanted)
    assert found["data"] < found["weights"] < found["random"]


def test_what_was_done_replays_on_a_skeleton_and_from_a_file(tmp_path: Path) -> None:
    model = net()
    factorize(model, X[:4], Budget(macs=0.6), calibration=CALLS)
    fresh = NETS["residual"]()
    apply_edits(fresh, history(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh), outputs(model))
    save_compressed(model, tmp_path / "net.safetensors")
    assert torch.equal(outputs(load_compressed(tmp_path / "net.safetensors", NETS["residual"]())), outputs(model))


@pytest.mark.parametrize("pruned_first", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_composes_with_channel_pruning(name: str, pruned_first: bool, tmp_path: Path) -> None:
    model = net(name)
    dense = measure(model, X).macs
    steps = [
        lambda: prune_channels(model, X[:4], Budget(macs=0.8), calibration=CALLS),
        lambda: factorize(model, X[:4], Budget(macs=0.8), calibration=CALLS),
    ]
    for step in steps if pruned_first else reversed(steps):
        assert step().edits
    assert measure(model, X).macs <= 0.8 * 0.8 * dense
    save_compressed(model, tmp_path / "net.safetensors")
    assert torch.equal(outputs(load_compressed(tmp_path / "net.safetensors", NETS[name]())), outputs(model))


def test_a_chain_is_factorized_again_as_the_layer_that_it_is() -> None:
    model = net()
    factorize(model, X[:4], Budget(macs=0.8), calibration=CALLS)
    once = outputs(model)
    assert distance(once, outputs(net())) < 0.5
    done = factorize(model, X[:4], Budget(macs=0.7), calibration=CALLS)
    again = {path for path in done.ranks if path in history(model)[0].layers}  # type: ignore[union-attr]
    assert again
    for path in again:
        assert [type(layer) for layer in model.get_submodule(path)] == [nn.Conv2d, nn.Conv2d]  # type: ignore[arg-type]


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(drawn=networks())
def test_random_networks_survive(drawn: tuple[RandomNetwork, Tensor]) -> None:
    """Groups, shuffles, splits, ties, norms: cheaper or untouched, and what was done replays."""
    network, x = drawn
    wanted, before = outputs(network, x), measure(network, x)
    for kind in ("spatial", "tucker"):
        model = copy.deepcopy(network)
        done = factorize(model, x, rank="energy:0.99", decomposition=kind)
        after = measure(model, x)
        assert after.params <= before.params
        assert after.macs <= before.macs
        if done.edits:
            fresh = copy.deepcopy(network)
            apply_edits(fresh, done.edits)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(outputs(fresh, x), outputs(model, x))
        else:
            assert torch.equal(outputs(model, x), wanted)


def test_the_network_is_as_it_was_but_for_its_layers() -> None:
    model = net().train()
    hook = model.a[0][0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    model.a[0][0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    stem = model.stem[0].weight.clone()  # type: ignore[index, union-attr]
    done = factorize(model, X[:4], Budget(macs=0.5), calibration=CALLS, exclude=["stem"])
    assert all(module.training for module in model.modules())
    assert torch.equal(model.stem[0].weight, stem)  # type: ignore[index, union-attr]
    assert done.left["stem.0"] == "excluded by pattern 'stem'"
    assert "a.0.0" in done.ranks
    chain = model.get_submodule("a.0.0")
    assert not any(parameter.requires_grad for parameter in chain.parameters())
    assert len(chain._forward_hooks) == 1
    hook.remove()
    assert not chain._forward_hooks


class Awkward(nn.Module):
    """Layers that are shared, tied, used by hand, never called, or of a class of their own."""

    class Own(nn.Conv2d):
        """A convolution that computes something else."""

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(1, 12)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.tied, self.other = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.other.weight = self.tied.weight
        self.by_hand = nn.Conv2d(12, 12, 3, padding=1)
        self.never = nn.Conv2d(12, 12, 3)
        self.own = self.Own(12, 12, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.alias = self.twice
        self.head = classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.alias(torch.relu(self.twice(x))))
        x = x + self.other(self.tied(x))
        x = x + F.conv_transpose2d(self.by_hand(x), self.by_hand.weight, padding=1)
        return self.head(self.normed(self.own(x)))


def test_awkward_layers_are_handled_or_left_by_name() -> None:
    torch.manual_seed(0)
    model = randomize(Awkward()).eval()
    reestimate_batchnorm(model, CALLS)
    wanted = outputs(model)
    done = factorize(model, X[:4], rank={"twice": 14}, calibration=CALLS)
    assert done.left["tied"] == done.left["other"] == "shares its weight with another layer"
    assert "has a weight that is also used outside of its own call" in done.left["by_hand"]
    assert done.left["never"] == "is not called on the data"
    assert done.left["own"] == "is a Own, no plain layer of torch"
    assert "no plain layer" in done.left["normed"]
    assert "twice" in done.ranks
    assert model.alias is model.twice
    assert distance(outputs(model), wanted) < 0.7


def test_nothing_to_replace_is_refused_with_reasons() -> None:
    with pytest.raises(ValueError, match=r"no layer .* could be replaced.* is the network itself"):
        factorize(nn.Linear(8, 8), torch.randn(4, 8), Budget(macs=0.5))
    with pytest.raises(ValueError, match="it has none"):
        factorize(nn.Sequential(nn.ReLU()), torch.randn(4, 8), Budget(macs=0.5))


def before_and_after(model: nn.Module) -> tuple[Any, ...]:
    return (repr(model), *(value.clone() for value in model.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget(macs=0.001)}, r"lowest reachable .* is [\d,]+"),
        ({"budget": Budget(bytes=0.01)}, r"lowest reachable"),
        ({"rank": 500}, r"`rank` 500 of layer 'stem\.0' is not possible: at most 3; give it"),
        ({"rank": {"stem.0": 4}}, r"`rank` 4 of layer 'stem\.0' is not possible: at most 3"),
        ({"rank": {"stern": 4}}, r"`rank` of 'stern': there is no such layer; layers: stem\.0"),
        ({"rank": "energy:1.5"}, r"energy:X with X in \(0, 1\), got 'energy:1.5'"),
        ({"rank": "energy"}, r"energy:X"),
        ({"rank": "best"}, r"must be energy:X, vbmf, an integer"),
        ({"rank": 0}, r"at least 1"),
        ({}, r"either a budget, .*, or a rank, .*, got neither"),
        ({"budget": Budget(macs=0.5), "rank": 2}, r"either a budget, .*, or a rank, .*, got both"),
        (
            {"rank": 2, "decomposition": "svd"},
            r"`decomposition` must be one of spatial, channel, tucker, cp, got 'svd'",
        ),
        ({"budget": Budget(macs=0.5), "init": "magic"}, r"`init` must be one of data, weights, random, got 'magic'"),
        (
            {"budget": Budget(macs=0.5), "allocation": "fair"},
            r"`allocation` must be one of greedy, uniform, got 'fair'",
        ),
        ({"budget": Budget(macs=0.5), "exclude": ["sterm"]}, r"'sterm' matches no module; near names: stem"),
        ({"budget": Budget(macs=0.5), "calibration": ()}, r"needs calibration data"),
    ],
)
def test_bad_input_leaves_the_network_as_it_was(options: dict[str, Any], message: str) -> None:
    model = net()
    before = before_and_after(model)
    with pytest.raises(ValueError, match=message) as caught:
        factorize(model, X[:4], **{"calibration": CALLS, **options})
    assert isinstance(caught.value, BudgetError) == ("lowest" in message)
    after = before_and_after(model)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("method", [factorize, compact_filters])
def test_data_that_is_not_finite_is_refused_by_the_layer_it_reaches(method: Any) -> None:
    model = net()
    bad = X.clone()
    bad[3, 0, 2, 2] = torch.nan
    before = before_and_after(model)
    with pytest.raises(ValueError, match=r"(stem|a\.0)\.0: calibration data gives values that are not finite"):
        method(model, X[:4], budget=Budget(macs=0.8), calibration=as_calls(bad))
    assert all(torch.equal(a, b) for a, b in zip(before[1:], before_and_after(model)[1:], strict=True))


def test_few_samples_are_said_and_do_no_harm() -> None:
    """Eight samples for 96 unknowns: the rest stays near the trained weights, so that other inputs survive it."""
    model = net("plain")
    wanted = outputs(model)
    few = as_calls(X[:8])
    with pytest.warns(UserWarning, match="hidden: 8 calibration samples for 96 unknowns"):
        factorize(model, X[:4], rank={"hidden": 16}, calibration=few)
    plain = net("plain")
    factorize(plain, X[:4], rank={"hidden": 16}, init="weights")
    assert distance(outputs(model)[8:], wanted[8:]) < 1.5 * distance(outputs(plain)[8:], wanted[8:])


def test_ranks_by_rule() -> None:
    model = net()
    done = factorize(model, X[:4], rank={"a.0.0": 5, "b.0.0": 7}, calibration=CALLS)
    assert done.ranks == {"a.0.0": 5, "b.0.0": 7}
    model = net()
    done = factorize(model, X[:4], rank={"a.0.0": (3, 5)}, decomposition="tucker", calibration=CALLS)
    assert done.ranks == {"a.0.0": (3, 5)}
    model = net()
    done = factorize(model, X[:4], rank="energy:0.9", calibration=CALLS)
    assert done.ranks
    assert next(iter(done.errors.values())) < 0.1 + 1e-6
    model = net()
    done = factorize(model, X[:4], rank="vbmf", decomposition="tucker", calibration=CALLS)
    assert set(done.ranks.values()) == {1, (1, 1)}, "random weights are noise"


def test_a_layer_with_larger_patches_than_moments_are_kept_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_compress.methods.replaceable.MAX_PATCH", 120)
    model = net("plain")
    layers = find_layers(model, as_calls(X[:2]), {})
    assert [layer.path for layer in layers.found if not layer.informed] == ["body.2.0"]
    assert "body.2.0" in factorize(model, X[:4], rank={"body.2.0": 8}, calibration=CALLS).ranks


def test_moments_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit together takes another run of the network, and comes to the same."""
    whole = factorize(net(), X[:4], Budget(macs=0.5), calibration=CALLS)
    runs: list[Sequence[str]] = []
    visit = planning.visit

    def spy(model: nn.Module, layers: Any, paths: Sequence[str], calls: Sequence[Call], see: Any) -> None:
        runs.append(paths)
        visit(model, layers, paths, calls, see)

    monkeypatch.setattr(planning, "visit", spy)
    monkeypatch.setattr(planning, "MEMORY", 1 << 18)
    parts = factorize(net(), X[:4], Budget(macs=0.5), calibration=CALLS)
    assert len(runs) > 1
    assert parts.ranks == whole.ranks


def test_a_layer_that_runs_slower_factorized_is_not_chosen_for_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """With times as given: layer `a` gets slower by any rank, `b` faster."""

    def timed(_: nn.Module, layers: Any, __: Any, candidates: Any) -> dict[str, dict[Any, float]]:
        slower = {layer.path: layer.path.startswith("a.") for layer in layers}
        return {
            path: {None: 100.0, **{c.rank: 120.0 if slower[path] else 10.0 + c.rank for c in candidates[path]}}
            for path in slower
        }

    class Clock(Stopwatch):
        def __call__(self, network: nn.Module) -> float:
            edits = history(network)
            replaced = [path for edit in edits if isinstance(edit, Replace) for path in edit.layers]
            return 1000.0 - 80.0 * len(replaced)

    monkeypatch.setattr(planning, "time_candidates", timed)
    monkeypatch.setattr(Stopwatch, "start", classmethod(lambda cls, model, calls: Clock(model, calls, 1000.0)))
    model = net()
    done = factorize(model, X[:4], Budget(latency=0.8), calibration=CALLS)
    assert done.ranks
    assert not any(path.startswith("a.") for path in done.ranks)


def test_a_real_latency_budget_is_met_or_refused() -> None:
    """Which of the two is this machine's affair; 64 channels at 32 px leave something to gain."""
    torch.manual_seed(0)
    wide = nn.Sequential(block(1, 64), block(64, 64), classifier(64)).eval()
    x = torch.randn(32, 1, 16, 16)
    with contextlib.suppress(BudgetError):
        assert factorize(wide, x, Budget(latency=0.9)).ranks
