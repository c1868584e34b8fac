"""What the coupling must find, what it must freeze, and that it leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.coupling import Coupling, Mask, prove, settle, trace_coupling
from lightning_compress.edits import Keep, apply_edits
from lightning_compress.footprint import measure
from tests.contract.nets import NETS
from tests.networks import AWKWARD, randomize

EVERY = {**AWKWARD, **NETS}


def halves(coupling: Coupling) -> Mask:
    cut = coupling.nothing_cut()
    for group in coupling.groups:
        cut[group.classes[: len(group.classes) // 2]] = True
    return cut


def example(model: nn.Module) -> tuple[Tensor, ...]:
    return model.example() if hasattr(model, "example") else (torch.randn(2, 1, 8, 8),)


@pytest.mark.parametrize("name", EVERY)
def test_predicted_costs_are_the_measured_ones(name: str) -> None:
    """Before and after a cut: what the plan says and what the network really does."""
    model = EVERY[name]()
    inputs = example(model)
    coupling = trace_coupling(model, inputs)
    settled = settle(coupling, halves)
    for cut in (coupling.nothing_cut(), *([settled.cut] if settled else [])):
        if cut.any() and settled is not None:
            apply_edits(model, [settled.keep])
        footprint = measure(model, inputs)
        assert coupling.params(cut) == footprint.params
        if not footprint.uncounted.keys() & {"mkldnn_rnn_layer", "lstm", "gru"}:
            assert coupling.macs(cut) == pytest.approx(footprint.macs, rel=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_left_behind(name: str) -> None:
    model = NETS[name]().train()
    model.head.eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    inputs = example(model)
    state = torch.get_rng_state()
    settle(trace_coupling(model, inputs), halves)
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Sorted(nn.Module):
    """An op without a rule in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.sort(self.a(x), dim=1).values)))


def test_an_unknown_op_costs_compression_and_is_named() -> None:
    coupling = trace_coupling(Sorted(), torch.randn(2, 4))
    assert [group.name for group in coupling.groups] == ["b"]
    assert "sort in the network itself, for which there is no rule" in coupling.reasons["a.weight[0]"]
    assert "meets data" in coupling.reasons["a.weight[1]"]
    assert coupling.reasons["c.weight[0]"] == "reaches the network's output"


class Literal(nn.Module):
    """Halves with a number in the code, or with one in an attribute."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3), nn.Conv2d(8, 4, 1)
        self.half = 8 if attribute else -1

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.a(x), self.half if self.half > 0 else 8, dim=1)
        return self.b(torch.relu(first) * second).mean((2, 3))


def test_a_size_in_an_attribute_follows() -> None:
    model = Literal(attribute=True)
    settled = settle(trace_coupling(model, torch.randn(2, 1, 8, 8)), halves)
    assert settled is not None
    assert settled.keep.attributes[""] == {"half": (8, 4)}


def test_a_size_in_the_code_freezes_what_depends_on_it() -> None:
    coupling = trace_coupling(Literal(attribute=False), torch.randn(2, 1, 8, 8))
    assert settle(coupling, halves) is None
    assert "split in the network itself does not follow" in coupling.reasons["a.weight[0]"]


def test_what_only_training_uses_is_followed() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.extra = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.b(h) + self.extra(h) if self.training else self.b(h)

    model = Auxiliary()
    coupling = trace_coupling(model, torch.randn(2, 4))
    apply_edits(model, [coupling.keep_edit(halves(coupling))])
    assert model.extra.weight.shape == (3, 4)
    assert model.train()(torch.randn(2, 4)).shape == (2, 3)


def test_parameters_that_share_memory_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].weight = nn.Parameter(model[1].weight)
    model[1].register_buffer("view", model[1].weight.detach()[:3])
    coupling = trace_coupling(model, torch.randn(2, 4))
    assert not coupling.groups


def planted(keep: Keep, tensor: str, dim: int) -> Keep:
    """The same edit, but one tensor keeps other indices."""
    size = keep.sizes[tensor][dim]
    right = keep.slices[tensor][dim]
    wrong = tuple(sorted(set(range(size)) - set(right)))[: len(right)]
    slices = {**keep.slices, tensor: {**keep.slices[tensor], dim: wrong}}
    return Keep(slices, keep.sizes, keep.attributes)


@pytest.mark.parametrize("name", NETS)
def test_the_proof_finds_a_planted_error(name: str) -> None:
    model = NETS[name]()
    randomize(model, 0)
    coupling = trace_coupling(model, example(model))
    cut = halves(coupling)
    keep = coupling.keep_edit(cut)
    assert prove(coupling, keep, cut).kind == "exact"
    wrong = [
        group.locations[-1]
        for group in coupling.groups
        for tensor, dim in [group.locations[-1]]
        if len(keep.slices[tensor][dim]) * 2 == keep.sizes[tensor][dim]
    ]
    assert len(wrong) >= 2
    for tensor, dim in wrong[:3]:
        proof = prove(coupling, planted(keep, tensor, dim), cut)
        assert proof.kind == "failed"
        assert proof.fault is not None
        assert "differs from the original" in proof.fault.message


def test_a_proof_on_networks_with_norms_over_channels_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    settled = settle(trace_coupling(model, torch.randn(2, 4)), halves)
    assert settled is not None
    assert settled.proof.kind == "restricted"
    assert settled.keep.attributes["1"] == {"normalized_shape": ((8,), (4,))}


def test_calls_of_several_parts_are_one_network() -> None:
    """Encoder and decoder called one after the other, not through a forward of their own."""
    model = nn.ModuleDict({"down": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), "up": nn.Linear(4, 6)})
    x, z = torch.randn(2, 6), torch.randn(2, 4)
    from lightning_compress.calls import Call

    coupling = trace_coupling(model, [Call((x,), path="down"), Call((z,), path="up")])
    assert [group.name for group in coupling.groups] == ["down.0"]


def test_half_precision_networks_are_proved_too() -> None:
    model = NETS["residual"]().to(torch.bfloat16)
    calls = as_calls(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16))
    settled = settle(trace_coupling(model, calls), halves)
    assert settled is not None
    assert settled.proof.kind == "exact"


def test_every_group_has_its_channels_wherever_they_live() -> None:
    coupling = trace_coupling(NETS["residual"](), torch.randn(2, 1, 8, 8))
    for group in coupling.groups:
        for location in group.locations:
            assert np.isin(group.classes, coupling.locations[location]).all()


def test_nothing_is_proved_of_what_is_not_a_number() -> None:
    class Undefined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) / 0.0 * 0.0)

    coupling = trace_coupling(Undefined(), torch.randn(2, 4))
    assert settle(coupling, halves) is None
    assert "does not follow" in coupling.reasons["a.weight[0]"]
