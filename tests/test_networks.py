"""The awkward and random networks, the judge of the coverage benchmark, and what both say of channel pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.architectures import ARCHITECTURES, QUICK, by_kind
from benchmarks.oracle import Kept, judge, named_tensors
from benchmarks.sides import ours
from tests.networks import AWKWARD, RandomNetwork, networks, randomize

# A network takes milliseconds, but the first of a process may take a second: no example is bound to a clock.
random_networks = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return randomize(AWKWARD[name]()).eval(), AWKWARD[name].example()


def cut(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the model with only the kept slices; where no layer checks its own sizes that is all there is to do."""
    model = copy.deepcopy(model)
    for name, tensor in named_tensors(model).items():
        for dim, indices in kept.get(name, {}).items():
            tensor.data = tensor.data.index_select(dim, indices)
    return model


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


@pytest.fixture
def chain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    return randomize(nn.Sequential(*layers)).eval(), (torch.randn(2, 3, 8, 8),)


def keep_in_chain(produced: Tensor, consumed: Tensor) -> Kept:
    after = {name: {0: produced} for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var")}
    return {"0.weight": {0: produced}, "0.bias": {0: produced}, **after, "3.weight": {1: consumed}}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_networks_run_and_depend_on_their_input(name: str) -> None:
    model, inputs = make(name)
    first = outputs(model, inputs)
    again = outputs(make(name)[0], inputs)
    other = outputs(model, AWKWARD[name].example(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, other, strict=True))
    for head in AWKWARD[name].heads:
        model.get_submodule(head)


def test_randomize_leaves_nothing_at_its_initial_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.GroupNorm(2, 8))
    nn.init.zeros_(model[0].weight)
    for name, tensor in named_tensors(randomize(model)).items():
        if tensor.is_floating_point():
            assert tensor.flatten().unique().numel() > 1, name
            assert (tensor != 0).all(), name
    assert (model[1].running_var > 0).all()


@given(networks())
@random_networks
def test_random_networks_are_finite_and_print_as_what_builds_them(drawn: tuple[RandomNetwork, Tensor]) -> None:
    model, x = drawn
    (y,) = outputs(model, (x,))
    assert torch.isfinite(y).all()
    assert torch.equal(y, outputs(eval(repr(model)), (x,))[0])


def test_the_list_has_sixty_families_and_no_name_twice() -> None:
    cases = [architecture.case for architecture in ARCHITECTURES]
    assert len(set(cases)) == len(cases)
    assert len(by_kind("cnn")) >= 60
    assert set(QUICK.split()) <= {architecture.name for architecture in by_kind("cnn")}


class TestJudge:
    def test_a_right_cut_is_exact(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        index = torch.tensor([0, 2, 5, 7])
        kept = keep_in_chain(index, index)
        verdict = judge(model, cut(model, kept), kept, inputs)
        assert verdict.kind == "exact"
        assert verdict.correct
        assert verdict.effect > 1e-3

    def test_a_consumer_cut_elsewhere_is_wrong(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        kept = keep_in_chain(torch.tensor([0, 2, 5, 7]), torch.tensor([0, 2, 5, 6]))
        assert judge(model, cut(model, kept), kept, inputs).kind == "WRONG"

    def test_statistics_cut_elsewhere_are_wrong(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        index = torch.tensor([0, 2, 5, 7])
        kept = {**keep_in_chain(index, index), "1.running_mean": {0: torch.tensor([1, 2, 5, 7])}}
        assert judge(model, cut(model, kept), kept, inputs).kind == "WRONG"

    def test_a_changed_value_is_wrong_however_small(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        index = torch.tensor([0, 2, 5, 7])
        kept = keep_in_chain(index, index)
        pruned = cut(model, kept)
        pruned[5].weight.data[0, 0] *= 1 + 1e-6
        verdict = judge(model, pruned, kept, inputs)
        assert (verdict.kind, verdict.reason) == ("WRONG", "5.weight does not hold the original's values")

    def test_shapes_that_do_not_fit_are_raised(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        kept = {"0.weight": {0: torch.tensor([0, 1])}, "0.bias": {0: torch.tensor([0, 1])}}
        verdict = judge(model, cut(model, kept), kept, inputs)
        assert verdict.kind == "raised"
        assert "RuntimeError" in verdict.reason

    def test_nothing_cut_is_no_op(self, chain: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
        model, inputs = chain
        verdict = judge(model, copy.deepcopy(model), {"0.weight": {0: torch.arange(8)}}, inputs)
        assert verdict.kind == "no-op"
        assert verdict.effect == 0

    @pytest.mark.parametrize(
        ("norm", "op"), [(nn.GroupNorm(1, 8), "native_group_norm"), (nn.GroupNorm(2, 8), "native_group_norm")]
    )
    def test_norms_over_channels_are_restricted(self, norm: nn.Module, op: str) -> None:
        model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)))
        index = torch.tensor([0, 2, 5, 7])  # as many of either half
        kept = {name: {0: index} for name in ("0.weight", "0.bias", "1.weight", "1.bias")} | {"3.weight": {1: index}}
        inputs = (torch.randn(2, 3, 8, 8),)
        pruned = cut(model, kept)
        pruned[1].num_channels = 4
        verdict = judge(model, pruned, kept, inputs)
        assert (verdict.kind, verdict.reason) == ("restricted", op)

        kept["3.weight"] = {1: torch.tensor([0, 2, 5, 6])}
        pruned = cut(model, kept)
        pruned[1].num_channels = 4
        assert judge(model, pruned, kept, inputs).kind == "WRONG"

    def test_channels_that_change_their_group_are_wrong(self) -> None:
        model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)))
        index = torch.tensor([0, 4, 5, 7])  # one of the first group, three of the second
        kept = {name: {0: index} for name in ("0.weight", "0.bias", "1.weight", "1.bias")} | {"2.weight": {1: index}}
        pruned = cut(model, kept)
        pruned[1].num_channels = 4
        assert judge(model, pruned, kept, (torch.randn(2, 3, 8, 8),)).kind == "WRONG"

    def test_an_op_that_mixes_channels_in_order_is_unprovable(self) -> None:
        class Sums(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(torch.sort(self.first(x), dim=1).values)

        model = randomize(Sums())
        index = torch.tensor([0, 2, 5, 7])
        kept = {"first.weight": {0: index}, "first.bias": {0: index}, "last.weight": {1: index}}
        verdict = judge(model, cut(model, kept), kept, (torch.randn(4, 3),))
        assert (verdict.kind, verdict.reason) == ("unprovable", "sort")


class TestChannelPruning:
    @pytest.mark.parametrize("name", AWKWARD)
    def test_awkward_networks(self, name: str) -> None:
        model, inputs = make(name)
        dense = copy.deepcopy(model)
        result = ours(model, inputs, 0.5, ())
        verdict = judge(dense, result.model, result.kept, inputs)
        assert verdict.kind in ("exact", "restricted"), verdict

    @given(networks())
    @random_networks
    def test_random_networks(self, drawn: tuple[RandomNetwork, Tensor]) -> None:
        model, x = drawn
        dense = copy.deepcopy(model)
        try:
            result = ours(model, (x,), 0.5, ())
        except ValueError as error:
            if "no channel in this network" not in str(error):
                raise
            return  # shuffles beside skips can tie all channels of a layer into one
        verdict = judge(dense, result.model, result.kept, (x,))
        assert verdict.kind in ("exact", "no-op"), verdict
