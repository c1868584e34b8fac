"""Sensitivity: what it measures, what it changes in a plan, and that the network does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.calls import as_calls
from lightning_compress.coupling import trace_coupling
from lightning_compress.edits import apply_edits
from lightning_compress.methods.criteria import score_channels
from lightning_compress.methods.pruning import prune_channels
from lightning_compress.methods.sensitivity import measure_sensitivity, weigh
from tests.contract.nets import NETS
from tests.networks import randomize

X = torch.randn(8, 1, 8, 8)


class Branches(nn.Module):
    """Two branches of the same form, of which the second hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)) for _ in range(2))
        self.share = 1e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.share * self.b(x)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_the_network_does_not_notice(name: str, training: bool) -> None:
    model = NETS[name]().train(training)
    randomize(model, 0)
    coupling = trace_coupling(model, X)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.named_parameters()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    scores = score_channels(coupling, "l2")
    found = measure_sensitivity(coupling, scores, as_calls(X))
    assert (found > 0).all()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert versions == {key: value._version for key, value in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert np.array_equal(found, measure_sensitivity(coupling, scores, as_calls(X)))


def test_it_is_the_error_of_the_network_without_the_worst_half() -> None:
    model = NETS["plain"]().eval()
    randomize(model, 0)
    coupling = trace_coupling(model, X)
    scores = score_channels(coupling, "l2")
    expected = model(X).detach()
    for group, found in zip(coupling.groups, measure_sensitivity(coupling, scores, as_calls(X)), strict=True):
        cut = coupling.nothing_cut()
        cut[group.classes[np.argsort(scores[group.classes])[: len(group.classes) // 2]]] = True
        other = NETS["plain"]().eval()
        other.load_state_dict(model.state_dict())
        apply_edits(other, [coupling.keep_edit(cut)])
        error = (other(X).detach() - expected).norm() / expected.norm()
        assert found == pytest.approx(error.item(), rel=1e-4)


def test_a_useless_layer_comes_last_and_loses_most() -> None:
    torch.manual_seed(0)
    model = Branches()
    model.b.load_state_dict(model.a.state_dict())
    coupling = trace_coupling(model, X)
    scores = score_channels(coupling, "l2")
    found = measure_sensitivity(coupling, scores, as_calls(X))
    places = {group.name: index for index, group in enumerate(coupling.groups)}
    assert found[places["b.0"]] < 1e-3 * found[places["a.0"]]
    weighed = weigh(coupling, scores, found, 1.0)
    useless, useful = (coupling.groups[places[name]].classes for name in ("b.0", "a.0"))
    assert weighed[useless].max() < weighed[useful].min()
    assert np.array_equal(np.argsort(weighed[useful]), np.argsort(scores[useful]))
    widths = {}
    for power in (0.0, 1.0):
        pruned = Branches()
        pruned.load_state_dict(model.state_dict())
        prune_channels(pruned, X, ratio=0.4, sensitivity=power)
        widths[power] = (pruned.a[0].out_channels, pruned.b[0].out_channels)
    assert widths[0.0][0] == pytest.approx(widths[0.0][1], abs=1)  # the weights are the same
    assert widths[1.0] == (16, 32 - 13 - 16)


def test_outputs_that_say_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    coupling = trace_coupling(model, torch.randn(2, 4))
    scores = score_channels(coupling, "l2")
    for value in (0.0, float("nan")):
        nn.init.constant_(model[2].weight, value)
        nn.init.constant_(model[2].bias, value)
        with pytest.raises(ValueError, match="outputs that are finite and not all zero"):
            measure_sensitivity(coupling, scores, as_calls(torch.randn(8, 4)))


def test_as_many_samples_as_are_asked_for() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    coupling = trace_coupling(model, torch.randn(2, 4))
    calls = as_calls([*as_calls(torch.randn(30, 4)), *as_calls(torch.randn(10, 4))])
    model[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    measure_sensitivity(coupling, score_channels(coupling, "l2"), calls, samples=20)
    assert seen == [15, 5, 15, 5]
