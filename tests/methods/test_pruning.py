"""Channel pruning as a function: what is chosen, what is refused, what is refitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget, BudgetError
from lightning_compress.calls import as_calls
from lightning_compress.coupling import trace_coupling
from lightning_compress.footprint import measure
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.choosing import Selection
from lightning_compress.methods.criteria import CRITERIA, GATHERED, activation_terms, gradient_terms, score_channels
from lightning_compress.methods.pruning import prune_channels
from tests.contract.nets import NETS
from tests.networks import randomize

X = torch.randn(2, 1, 8, 8)


def network(name: str = "residual") -> nn.Module:
    model = NETS[name]().eval()
    randomize(model, 0)
    return model


def wide() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 3, 3),
    ).eval()


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("unit", ["macs", "params", "bytes"])
def test_budgets_are_met_from_just_below(unit: str, fraction: float, ranking: Any) -> None:
    """As the footprint measures them: of bytes, those of the file with its header and its edits."""
    model = wide()
    before = getattr(measure(model, X), unit)
    prune_channels(model, X, Budget(**{unit: fraction}), ranking=ranking)
    reached = getattr(measure(model, X), unit) / before
    assert fraction - 0.02 < reached <= fraction


def test_several_budgets_are_all_met() -> None:
    model = wide()
    before = measure(model, X)
    prune_channels(model, X, Budget(macs=0.7, params=0.4, bytes=before.bytes // 2))
    after = measure(model, X)
    assert after.macs <= 0.7 * before.macs
    assert after.params <= 0.4 * before.params
    assert artifact_bytes(model) <= before.bytes // 2


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_round_to(ranking: Any) -> None:
    model = wide()
    prune_channels(model, X, Budget(macs=0.5), round_to=8, ranking=ranking)
    assert model[0].out_channels % 8 == 0
    assert model[3].out_channels % 8 == 0
    assert model[0].out_channels + model[3].out_channels < 128


def test_layer_ranking_cuts_every_layer_alike() -> None:
    model = wide()
    prune_channels(model, X, ratio=0.25, ranking="layer")
    assert (model[0].out_channels, model[3].out_channels) == (48, 48)


def test_excluded_layers_stay() -> None:
    model = network()
    prune_channels(model, X, ratio=0.5, ranking="layer", exclude=["a.0*"])
    assert model.a[0][0].out_channels == 16
    assert model.b[0][0].out_channels == 16


def test_the_worst_channels_go() -> None:
    model = wide()
    with torch.no_grad():
        model[3].weight[10:] *= 5
        model[5].weight[:, 10:] *= 5
        kept = model[3].weight[10:].clone()
    prune_channels(model, X, ratio=10 / 64, ranking="layer", exclude=["0"])
    assert torch.equal(model[3].weight, kept)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {*GATHERED}))
def test_every_criterion_prunes(criterion: str) -> None:
    model = network("plain")
    assert prune_channels(model, X, Budget(macs=0.6), criterion=criterion).proof == "exact"


def test_criteria_are_what_their_papers_say() -> None:
    """By hand, on one layer whose channels live in `0.weight[0]` and `2.weight[1]`."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    coupling = trace_coupling(model, torch.randn(2, 3))
    classes = coupling.groups[0].classes
    a, b = model[0].weight.detach(), model[2].weight.detach().T

    def relative(*terms: torch.Tensor) -> np.ndarray:
        return sum((t / t.mean()).double() for t in terms).div(len(terms)).numpy()

    expected = {
        "l1": relative(a.abs().mean(1), b.abs().mean(1)),
        "l2": relative(a.square().mean(1).sqrt(), b.square().mean(1).sqrt()),
        "fpgm": relative((a[:, None] - a[None]).norm(dim=2).mean(1)),
    }
    for criterion, scores in expected.items():
        assert np.allclose(score_channels(coupling, criterion)[classes], scores, rtol=1e-5)
    loss = model(torch.randn(5, 3)).square().sum()
    loss.backward()
    terms = gradient_terms(coupling, dict(model.named_parameters()))
    assert torch.allclose(terms["0.weight", 0], (model[0].weight * model[0].weight.grad).sum(1).square())
    assert torch.allclose(terms["2.weight", 1], (model[2].weight * model[2].weight.grad).sum(0).square())
    terms = gradient_terms(coupling, dict(model.named_parameters()), criterion="fisher")
    assert torch.allclose(terms["2.weight", 1], (model[2].weight * model[2].weight.grad).square().sum(0))
    x = torch.randn(7, 3)
    seen = activation_terms(coupling, as_calls(x))
    hidden = model[:2](x).square().mean(0).sqrt().detach()
    assert torch.allclose(seen["2.weight", 1], hidden)
    assert np.allclose(score_channels(coupling, "activation", seen)[classes], relative(hidden), rtol=1e-5)
    squares = np.sort(score_channels(coupling, "l2")[classes]) ** 2
    lamp = [float(square / squares[place:].sum()) for place, square in enumerate(squares)]
    assert np.allclose(np.sort(score_channels(coupling, "lamp")[classes]), lamp, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"criterion": "l3"},
            "must be one of l1, l2, fpgm, .*, lamp, random, got 'l3'",
        ),
        ({"ranking": "local"}, "one of global, layer, isomorphic, got 'local'"),
        ({"round_to": 0}, "at least 1, got 0"),
        ({"exclude": "head"}, "list of patterns"),
        ({"floor": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_bad_selections(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**arguments)


def test_a_pattern_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(ValueError, match=r"'shortcat' matches no module; near names: .*shortcut"):
        prune_channels(network(), X, ratio=0.5, exclude=["shortcat"])


def test_a_budget_out_of_reach_says_the_lowest_and_changes_nothing() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"lowest reachable by cutting channels is [\d,]+ \(0\.\d+ of it\)"):
        prune_channels(model, X, Budget(macs=0.001))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_file_out_of_reach_is_refused_in_bytes_of_the_file() -> None:
    for size in (2000, 10):  # the second is less than the header alone
        with pytest.raises(BudgetError, match=rf"a file of {size:,} bytes cannot be met .* header and the edits"):
            prune_channels(network(), X, Budget(bytes=size))


def test_the_lowest_that_is_named_can_be_reached() -> None:
    model = network()
    with pytest.raises(BudgetError) as refused:
        prune_channels(model, X, Budget(macs=0.001))
    lowest = int(str(refused.value).split("channels is ")[1].split(" ")[0].replace(",", ""))
    prune_channels(model, X, Budget(macs=lowest + 1))
    assert measure(model, X).macs == lowest


def test_nothing_to_cut() -> None:
    with pytest.raises(
        ValueError, match=r"no channel in this network that could be cut: .*reaches the network's output"
    ):
        prune_channels(nn.Linear(4, 3), torch.randn(2, 4), ratio=0.5)


def test_neither_or_both_of_budget_and_ratio() -> None:
    for arguments in ({}, {"budget": Budget(macs=0.5), "ratio": 0.5}):
        with pytest.raises(ValueError, match=r"either a budget, .* or a ratio, got (neither|both)"):
            prune_channels(network(), X, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = network()
    model.a[0][0].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"scores of 'a\.0\.0\.weight' are not finite"):
        prune_channels(model, X, ratio=0.5)


def test_slimming_without_norms_says_what_it_needs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="needs norm layers with a scale"):
        prune_channels(model, torch.randn(2, 4), ratio=0.5, criterion="bn_scale")


@pytest.mark.parametrize("name", NETS)
def test_refit_brings_the_outputs_nearer(name: str) -> None:
    """On the data it was fitted on and on other data of the same kind."""
    basis = torch.randn(6, 64)

    def images(count: int, seed: int) -> torch.Tensor:
        return (torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ basis).view(-1, 1, 8, 8)

    calibration, held_out = images(256, 1), images(64, 2)
    dense = network(name)
    reestimate_batchnorm(dense, as_calls(calibration))
    target = dense(held_out)
    errors = {}
    for refit in (False, True):
        model = network(name)
        model.load_state_dict(dense.state_dict())
        prune_channels(model, X, ratio=0.3, ranking="layer", calibration=as_calls(calibration) if refit else None)
        errors[refit] = (model(held_out) - target).square().mean().item()
    assert errors[True] < 0.7 * errors[False]


def test_refit_is_exact_where_the_cut_channels_are_combinations_of_the_others() -> None:
    """Grouped and transposed consumers as well: their layouts differ."""
    for consumer in (
        nn.Conv2d(8, 6, 1),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.ConvTranspose2d(8, 4, 3, groups=2),
    ):
        first = nn.Conv2d(1, 8, 3, bias=False)
        with torch.no_grad():
            first.weight[[1, 3, 5, 7]] = 100 * first.weight[[0, 2, 4, 6]]  # the small ones go
        model = nn.Sequential(first, consumer, nn.ReLU(), nn.Conv2d(consumer.out_channels, 2, 1)).double()
        x = torch.randn(16, 1, 9, 9, dtype=torch.float64)
        before = model(x)
        pruned = prune_channels(model, x, ratio=0.5, ranking="layer", calibration=as_calls(x), exclude=["1"])
        assert pruned.proof == "exact"
        assert model[0].out_channels == 4
        assert torch.allclose(model(x), before, atol=2e-3 * before.abs().max().item())


def test_reestimated_statistics_are_the_averages_of_the_data() -> None:
    norm = nn.BatchNorm2d(3)
    tracked = norm.num_batches_tracked.clone()
    calls = as_calls([*as_calls(torch.randn(8, 3, 4, 4) + 2), *as_calls(torch.randn(8, 3, 4, 4) - 1)])
    reestimate_batchnorm(norm, calls)
    means = torch.stack([call.args[0].mean((0, 2, 3)) for call in calls]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert norm.momentum == 0.1
    assert torch.equal(norm.num_batches_tracked, tracked)
