"""Edits: plain data in, smaller tensors out, all or nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.edits import (
    EditError,
    Keep,
    Replace,
    Replacement,
    Spec,
    apply_edits,
    describe,
    edits_from_json,
    edits_to_json,
    history,
    rewind_edits,
    skeleton,
)
from lightning_compress.optimizers import follow_edits


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def keep(indices: tuple[int, ...] = (0, 2, 5), size: int = 6) -> Keep:
    return Keep(
        slices={"0.weight": {0: indices}, "0.bias": {0: indices}, "2.weight": {1: indices}},
        sizes={"0.weight": (size, 4), "0.bias": (size,), "2.weight": (2, size)},
        attributes={"0": {"out_features": (size, len(indices))}, "2": {"in_features": (size, len(indices))}},
        origin="test",
    )


def test_weights_are_carried_over() -> None:
    model = net()
    old = model[0].weight.detach().clone()
    apply_edits(model, [keep()])
    assert torch.equal(model[0].weight, old[[0, 2, 5]])


def test_parameters_stay_the_same_objects_and_gradients_are_cut() -> None:
    model = net()
    model(torch.ones(1, 4)).sum().backward()
    before, grad = list(model.parameters()), model[0].weight.grad.clone()
    apply_edits(model, [keep()])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model[0].weight.grad, grad[[0, 2, 5]])


def test_backward_works_while_an_old_graph_is_alive() -> None:
    """The old graph holds the gradient accumulators, which remember the old shape."""
    model = net()
    held = model(torch.ones(1, 4)).sum()
    apply_edits(model, [keep()])
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad.shape == (3, 4)
    del held


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (keep(size=7, indices=(0, 1)), r"expected shape \[7, 4\], got \[6, 4\]"),
        (keep(indices=(2, 0)), "ascending"),
        (keep(indices=(0, 6)), "below 6"),
        (keep(indices=()), "at least one"),
        (Keep({"9.weight": {0: (0,)}}, {"9.weight": (2, 2)}), "no such tensor"),
        (Keep({}, {}, {"0": {"out_features": (5, 3)}}), "expected 5, got 6"),
        (Keep({}, {}, {"0": {"nothing": (5, 3)}}), "another architecture"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(edit: Keep, message: str) -> None:
    model = net()
    with pytest.raises(EditError, match=message):
        apply_edits(model, [edit])
    assert model[0].weight.shape == (6, 4)
    assert history(model) == ()


def test_all_or_nothing_over_several_edits() -> None:
    model = net()
    with pytest.raises(EditError, match="was it applied before"):
        apply_edits(model, [keep(), keep()])
    assert model[0].weight.shape == (6, 4)
    assert model[0].out_features == 6


def test_tied_tensors_are_cut_once_and_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False)})
    model["b"].weight = model["a"].weight
    cut = {"a.weight": {0: (1, 2)}, "b.weight": {0: (1, 2)}}
    changes = apply_edits(model, [Keep(cut, dict.fromkeys(cut, (4, 3)))])
    assert len(changes) == 1
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.shape == (2, 3)


def test_memory_format_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    apply_edits(model, [Keep({"0.weight": {0: (0, 1, 2, 3)}}, {"0.weight": (8, 8, 3, 3)})])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_rewind_brings_back_shapes_and_attributes() -> None:
    model = net()
    second = keep((0, 1), 3)
    apply_edits(model, [keep(), second])
    rewind_edits(model, 1)
    assert history(model) == (keep(),)
    assert model[0].weight.shape == (3, 4)
    rewind_edits(model)
    model.load_state_dict(net().state_dict())
    assert (model[0].out_features, model[2].in_features, history(model)) == (6, 6, ())


def test_skeleton_holds_no_memory_and_takes_the_same_edits() -> None:
    model = net()
    bones = skeleton(model)
    apply_edits(bones, [keep()])
    assert all(p.is_meta for p in bones.parameters())
    assert bones[0].weight.shape == (3, 4)
    assert model[0].weight.shape == (6, 4)


indices = st.sets(st.integers(0, 5), min_size=1).map(lambda s: tuple(sorted(s)))


@settings(deadline=None)
@given(indices)
def test_json_round_trip(chosen: tuple[int, ...]) -> None:
    edits = (keep(chosen),)
    assert edits_from_json(json.loads(json.dumps(edits_to_json(edits)))) == edits


@pytest.mark.parametrize("damage", [{"kind": "melt"}, {"indices": []}, {"slices": None}, {"sizes": {"0.weight": 3}}])
def test_damaged_json_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(EditError, match=r"unknown kind|damaged"):
        edits_from_json([{**keep().to_json(), **damage}])


def chain(rank: int = 2) -> Replace:
    pair = nn.Linear(4, rank, bias=False), nn.Linear(rank, 6)
    return Replace({"0": (describe(nn.Linear(4, 6)), _chain_spec(*pair))}, "test")


def _chain_spec(*layers: nn.Module) -> Spec:
    return {"type": "Chain", "form": "channel", "layers": tuple(describe(layer) for layer in layers)}


def test_a_replaced_layer_keeps_its_bias_its_mode_and_its_hooks() -> None:
    model = net().eval()
    bias = model[0].bias
    seen: list[torch.Size] = []
    handle = model[0].register_forward_hook(lambda _, __, output: seen.append(output.shape))
    [change] = apply_edits(model, [chain()])
    assert model[0][1].bias is bias
    assert not model[0].training
    model(torch.ones(3, 4))
    handle.remove()
    model(torch.ones(3, 4))
    assert seen == [torch.Size([3, 6])]
    assert isinstance(change, Replacement)
    assert [p.shape for p in change.old] == [(6, 4)]
    assert [p.shape for p in change.new] == [(2, 4), (6, 2)]


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    model = net()
    model.again = model[0]  # type: ignore[assignment]
    apply_edits(model, [chain()])
    assert model.again is model[0]


def test_replacements_are_undone_and_replayed_in_any_mixture() -> None:
    """A replacement, then a cut inside of what it put there, on a network, a skeleton and from JSON."""
    inner = Keep(
        slices={"0.0.weight": {0: (1,)}, "0.1.weight": {1: (1,)}},
        sizes={"0.0.weight": (2, 4), "0.1.weight": (6, 2)},
        attributes={"0.0": {"out_features": (2, 1)}, "0.1": {"in_features": (2, 1)}},
    )
    edits = edits_from_json(json.loads(json.dumps(edits_to_json([chain(), inner]))))
    assert edits == (chain(), inner)
    for model in (net(), skeleton(net())):
        apply_edits(model, edits)
        assert [tuple(p.shape) for p in model[0].parameters()] == [(1, 4), (6, 1), (6,)]
        rewind_edits(model)
        assert [(n, p.shape) for n, p in model.named_parameters()] == [
            (n, p.shape) for n, p in net().named_parameters()
        ]
        assert describe(model[0]) == describe(nn.Linear(4, 6))
        apply_edits(model, edits)
        assert history(model) == edits


def test_a_replacement_that_does_not_fit_changes_nothing() -> None:
    model = net()
    before = repr(model)
    wrong = Replace({"0": (describe(nn.Linear(4, 7)), _chain_spec(nn.Linear(4, 7)))})
    for edits, message in (
        ([chain(), chain()], r"'0': expected Linear\(4, 6\), got Chain\(.*\); was it applied before"),
        ([wrong], r"expected Linear\(4, 7\), got Linear\(4, 6\)"),
        ([Replace({"9": (describe(nn.Linear(4, 6)), {})})], "'9': the network has no such layer"),
        ([Replace({"0": (describe(nn.Linear(4, 6)), {"type": "Linjear"})})], "unknown type of layer 'Linjear'; known"),
        ([Replace({"0": (describe(nn.Linear(4, 6)), {"type": "Linear"})})], "a Linear cannot be made of"),
    ):
        with pytest.raises(EditError, match=message):
            apply_edits(model, edits)
    assert repr(model) == before
    assert history(model) == ()


@pytest.mark.parametrize("groups", [1, 2])
def test_optimizers_hold_new_parameters_where_old_ones_stood(groups: int) -> None:
    model = net()
    parameters = list(model.parameters())
    split = [{"params": parameters[:1]}, {"params": parameters[1:]}] if groups == 2 else [{"params": parameters}]
    optimizer = torch.optim.Adam(split, lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    kept = optimizer.state[model[0].bias]["exp_avg"]
    follow_edits(optimizer, apply_edits(model, [chain()]))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert set(optimizer.state) <= set(held)
    assert optimizer.state[model[0][1].bias]["exp_avg"] is kept
    nn.init.ones_(model[0][0].weight)
    nn.init.ones_(model[0][1].weight)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
