"""Regularisers of channels: their gradients are those of what is written out, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.coupling import Coupling, trace_coupling
from lightning_compress.methods.regularization import (
    ChannelSlices,
    cut_of,
    group_norm_factors,
    lasso_factors,
    norm_scales,
    pull_scales,
)
from tests.contract.nets import NETS
from tests.networks import randomize

X = torch.randn(2, 1, 8, 8)

every_net = pytest.mark.parametrize("name", NETS)


def network(name: str) -> tuple[nn.Module, Coupling]:
    model = NETS[name]().eval()
    randomize(model, 0)
    return model, trace_coupling(model, X)


def squares(coupling: Coupling, parameters: dict[str, Tensor]) -> list[Tensor]:
    """Written out: for each layer the squared norm of each channel, slice by slice."""
    layers = []
    for group in coupling.groups:
        channels = []
        for channel in group.classes:
            total = torch.zeros(())
            for (name, dim), classes in coupling.locations.items():
                places = np.flatnonzero(classes == channel)
                if name in parameters and len(places):
                    slices = parameters[name].index_select(dim, torch.from_numpy(places))
                    total = total + slices.square().sum()
            channels.append(total)
        layers.append(torch.stack(channels))
    return layers


def group_norm(layers: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for layer in layers:
        norms = layer.detach().sqrt()
        gamma = 2 ** (4 * (norms.max() - norms) / (norms.max() - norms.min()))
        total = total + (gamma * layer).sum() / 2
    return total


def group_lasso(layers: list[Tensor]) -> Tensor:
    return sum((layer.sqrt().sum() for layer in layers), torch.zeros(()))


@every_net
@pytest.mark.parametrize("written_out", [group_norm, group_lasso])
def test_gradients_are_those_of_the_regulariser(name: str, written_out: Callable[[list[Tensor]], Tensor]) -> None:
    model, coupling = network(name)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(
        0.1 * written_out(squares(coupling, parameters)), list(parameters.values()), allow_unused=True
    )
    before = {}
    for key, parameter in parameters.items():
        parameter.grad = torch.randn(parameter.shape)
        before[key] = parameter.grad.clone()
    slices = ChannelSlices(coupling)
    norms = slices.norms(parameters)
    assert torch.allclose(norms.square(), torch.cat(squares(coupling, parameters)), rtol=1e-4)
    factors = group_norm_factors(slices, norms) if written_out is group_norm else lasso_factors(norms)
    slices.pull(parameters, factors, 0.1)
    for (key, parameter), gradient in zip(parameters.items(), expected, strict=True):
        added = parameter.grad - before[key]
        assert torch.allclose(added, torch.zeros(()) if gradient is None else gradient, atol=1e-5), key
    assert any(gradient is not None for gradient in expected)


def test_factors_of_group_norm_run_from_one_to_sixteen() -> None:
    _, coupling = network("residual")
    slices = ChannelSlices(coupling)
    factors = group_norm_factors(slices, torch.rand(len(slices.classes)))
    ends = np.cumsum([len(group.classes) for group in coupling.groups])
    for layer in factors.tensor_split(ends[:-1].tolist()):
        assert float(layer.min()) == 1.0
        assert float(layer.max()) == 16.0
    assert torch.equal(group_norm_factors(slices, torch.ones(len(slices.classes))), torch.ones(len(slices.classes)))


@every_net
def test_marked_channels_are_pulled_to_zero_and_only_those(name: str) -> None:
    model, coupling = network(name)
    cut = coupling.nothing_cut()
    for group in coupling.groups:
        cut[group.classes[::3]] = True
    keep = coupling.keep_edit(cut)
    assert np.array_equal(cut_of(coupling, keep), cut)
    slices, parameters = ChannelSlices(coupling), dict(model.named_parameters())
    norms = slices.norms(parameters)
    state = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        slices.pull(parameters, slices.among(cut), 1.0)
        optimizer.step()
    after, marked = slices.norms(parameters), slices.among(cut).bool()
    assert (after[marked] < 1e-6 * norms[marked]).all()
    for key, parameter in parameters.items():  # what survives the cut has not moved by a bit
        kept = {dim: torch.tensor(indices) for dim, indices in keep.slices.get(key, {}).items()}
        now, then = parameter.detach(), state[key]
        for dim, indices in kept.items():
            now, then = now.index_select(dim, indices), then.index_select(dim, indices)
        assert torch.equal(now, then), key


def test_frozen_channels_and_tensors_that_are_left_out_stay() -> None:
    model, coupling = network("plain")
    group = coupling.groups[0]
    coupling.freeze([group.classes], "is wanted")
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    slices = ChannelSlices(coupling)
    left = {key: p for key, p in parameters.items() if key != "hidden.bias"}
    slices.pull(left, torch.ones(len(slices.classes)), 1.0)
    name = f"{group.name}.weight"
    assert not parameters[name].grad.any()
    assert not parameters["hidden.bias"].grad.any()
    assert parameters["hidden.weight"].grad.any()


def test_slimming_pulls_scales_by_their_sign() -> None:
    model, _ = network("residual")
    scales = list(norm_scales(model))
    assert len(scales) == 5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pull_scales(norm_scales(model), 0.3)
    for parameter in model.parameters():
        expected = 0.3 * parameter.detach().sign() if any(parameter is s for s in scales) else 0 * parameter.detach()
        assert torch.equal(parameter.grad, expected)
