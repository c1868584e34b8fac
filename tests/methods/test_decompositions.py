"""Low-rank forms: the function that they compose to, exact at full rank, never worse than from the weights alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.edits import build, describe
from lightning_compress.methods.approximation import Factors, Form, approximate
from lightning_compress.methods.forms import DECOMPOSITIONS
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Moments, Objective
from lightning_compress.methods.pricing import price
from lightning_compress.methods.vbmf import evbmf_rank

property_test = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
every_form = pytest.mark.parametrize("form", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS.keys())


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """Plain layers of all kinds, with random weights, in double precision."""
    torch.manual_seed(draw(st.integers(0, 999)))
    sides = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2])) if sides else 1
    inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
    bias = draw(st.booleans())
    if not sides:
        return nn.Linear(inputs, outputs, bias=bias).double()
    transposed = draw(st.integers(0, 3)) == 0
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 2)) for _ in range(sides)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "groups": groups,
        "bias": bias,
    }
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 3])) for _ in range(sides))
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{sides}d")
    return cast(nn.Module, kind(inputs, outputs, kernel, **options).double())


def data(layer: nn.Module, samples: int = 6) -> Tensor:
    """Inputs whose channels and pixels depend on each other, as those of a trained network do."""
    geometry = cast(Geometry, Geometry.of(layer))
    x = torch.randn(samples, geometry.inputs, *[7] * len(geometry.kernel), dtype=torch.float64)
    mix = torch.randn(geometry.inputs, geometry.inputs, dtype=torch.float64)
    x = torch.einsum("nc...,cd->nd...", x, mix * torch.logspace(0, -2, geometry.inputs, dtype=torch.float64))
    for axis in range(len(geometry.kernel)):
        x = x + x.roll(1, 2 + axis)
    return x + 0.5


def parts(layer: nn.Module) -> tuple[Geometry, Tensor, Tensor | None]:
    geometry = cast(Geometry, Geometry.of(layer))
    bias = cast(Tensor | None, layer.bias)
    return geometry, geometry.canonical(cast(Tensor, layer.weight).detach()), None if bias is None else bias.detach()


def made(form: Form, layer: nn.Module, rank: Any, factors: Factors, bias: Tensor | None) -> nn.Module:
    geometry, weight, _ = parts(layer)
    module = build(form.spec(geometry, rank), weight)
    form.fill(geometry, module, factors, bias)
    return module


def objective(layer: nn.Module, x: Tensor) -> Objective:
    geometry, _, bias = parts(layer)
    moments = Moments(geometry)
    moments.add(x, layer(x))
    return moments.objective(centred=bias is not None)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@property_test
@given(layer=layers())
def test_a_layer_is_a_matrix_on_patches(layer: nn.Module) -> None:
    """Every kind of layer, stride, dilation, padding and grouping; and its weight comes back as it was."""
    geometry, weight, bias = parts(layer)
    x = data(layer)
    added = 0 if bias is None else bias.view(geometry.groups, -1, 1)
    y = layer(x).detach()
    if geometry.kernel:
        assert geometry.output_size(x.shape[2:]) == tuple(y.shape[2:])
    for patches, outputs in geometry.columns(x, y):
        assert torch.allclose(weight.flatten(2) @ patches + added, outputs, atol=1e-10)
    assert torch.equal(geometry.native(weight), layer.weight)
    assert geometry.spec == describe(layer)


@every_form
@property_test
@given(layer=layers(), choice=st.floats(0, 1))
def test_the_chain_is_what_its_factors_compose_to(form: Form, layer: nn.Module, choice: float) -> None:
    geometry, weight, bias = parts(layer)
    assume(form.refuses(geometry) is None)
    x = data(layer)
    candidates = form.candidates(geometry, weight, objective(layer, x).second)
    candidate = candidates[round(choice * (len(candidates) - 1))]
    factors = form.start(geometry, weight, candidate.rank, None)
    module = made(form, layer, candidate.rank, factors, bias)
    with torch.no_grad():
        layer.weight.copy_(geometry.native(form.compose(geometry, factors)))
        assert relative(module(x), layer(x)) < 1e-10


@pytest.mark.parametrize("form", [f for f in DECOMPOSITIONS.values() if f.name != "cp"])  # whose full rank is not known
@property_test
@given(layer=layers())
def test_full_rank_is_the_layer(form: Form, layer: nn.Module) -> None:
    geometry, weight, bias = parts(layer)
    assume(form.refuses(geometry) is None)
    x = data(layer)
    problem = objective(layer, x)
    rank = form.candidates(geometry, weight, problem.second)[0].rank
    for metric in (problem, Objective.of_weight(weight)):
        factors, error = approximate(form, geometry, weight, rank, metric)
        assert error < 1e-8
        with torch.no_grad():
            assert relative(made(form, layer, rank, factors, bias)(x), layer(x)) < 1e-4


@every_form
@property_test
@given(layer=layers(), choice=st.floats(0, 1))
def test_outputs_are_never_worse_than_from_the_weights_alone(form: Form, layer: nn.Module, choice: float) -> None:
    """Measured on what the layers really give, bias corrected on both sides."""
    geometry, weight, _ = parts(layer)
    assume(form.refuses(geometry) is None)
    x = data(layer)
    problem = objective(layer, x)
    candidates = form.candidates(geometry, weight, problem.second)
    rank = candidates[round(choice * (len(candidates) - 1))].rank
    informed, predicted = approximate(form, geometry, weight, rank, problem)
    plain, _ = approximate(form, geometry, weight, rank, Objective.of_weight(weight))
    errors = []
    with torch.no_grad():
        y = layer(x)
        for factors in (informed, plain):
            offset = problem.offset(form.compose(geometry, factors).flatten(2))
            errors.append(float((made(form, layer, rank, factors, offset)(x) - y).square().mean()))
    scale = problem.energy / geometry.outputs
    assert errors[0] <= errors[1] + 1e-9 * scale
    assert errors[0] == pytest.approx(predicted * scale, rel=1e-4, abs=1e-9 * scale)


@every_form
@property_test
@given(layer=layers())
def test_candidates_go_from_dear_and_exact_to_cheap_and_rough(form: Form, layer: nn.Module) -> None:
    geometry, weight, _ = parts(layer)
    assume(form.refuses(geometry) is None)
    x = data(layer)
    candidates = form.candidates(geometry, weight, objective(layer, x).second)
    places = [(1, tuple(x.shape[2:]))]
    macs = [price(form.spec(geometry, candidate.rank), places).macs for candidate in candidates]
    errors = [candidate.error for candidate in candidates]
    assert all(0 <= error <= 1 + 1e-9 for error in errors)
    assert macs == sorted(macs, reverse=True)
    if form.name != "cp":  # found by iteration
        assert errors == pytest.approx(sorted(errors), abs=1e-9)


def test_the_svd_of_a_linear_layer_is_that_of_its_outputs() -> None:
    """Against torch's own: the best approximation of the outputs has the error of the singular values left out."""
    torch.manual_seed(0)
    layer, x = (
        nn.Linear(12, 9, bias=False).double(),
        torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12).double(),
    )
    form, (geometry, weight, _) = DECOMPOSITIONS["channel"], parts(layer)
    values = torch.linalg.svdvals(layer(x)).detach().square()
    for rank in range(1, 10):
        _, error = approximate(form, geometry, weight, rank, objective(layer, x))
        assert error == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-3, abs=1e-9)


def test_weight_space_ranks_are_those_of_the_unfolded_weight() -> None:
    """Without data, the spatial form is the singular value decomposition of [(channel, row), (column, output)]."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double()
    form, (geometry, weight, _) = DECOMPOSITIONS["spatial"], parts(layer)
    values = torch.linalg.svdvals(weight[0].permute(1, 2, 3, 0).reshape(12, 18)).square()
    for candidate in form.candidates(geometry, weight, None):
        _, error = approximate(form, geometry, weight, candidate.rank, Objective.of_weight(weight))
        expected = float(values[candidate.rank :].sum() / values.sum())
        assert error == pytest.approx(expected, abs=1e-9)
        assert candidate.error == pytest.approx(expected, abs=1e-9)


def test_terms_of_cp_do_not_cancel_each_other() -> None:
    """A tensor of border rank 2 and rank 3: unregularised least squares lets two terms grow without bound."""
    torch.manual_seed(0)
    a, b = (torch.randn(4, dtype=torch.float64) for _ in range(2))
    x, y = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    degenerate = sum(torch.einsum("o,c,i,j->ocij", *vectors, x) for vectors in ((b, a, x), (a, b, x), (a, a, y)))
    weight = cast(Tensor, degenerate)[None]
    geometry = Geometry(4, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    factors = DECOMPOSITIONS["cp"].start(geometry, weight, 2, None)
    composed = DECOMPOSITIONS["cp"].compose(geometry, factors)
    norms = torch.stack([factor.reshape(2, -1).norm(dim=1) for factor in factors[:3]]).prod(0)
    norms = norms * factors[3].flatten(2).norm(dim=1)[0]
    assert norms.max() < 20 * weight.norm()
    assert relative(composed, weight) < 0.5


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_variational_bayes_sees_the_rank_under_noise(rank: int) -> None:
    torch.manual_seed(0)
    low = torch.randn(60, rank) @ torch.randn(rank, 100)
    assert evbmf_rank(low + 0.3 * torch.randn(60, 100)) == rank
    assert evbmf_rank(torch.randn(60, 100)) == 0
    assert evbmf_rank(torch.zeros(6, 10)) == 0
