"""Compact filters from trained weights: the same function as composed, and never worse than from the weights alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.edits import apply_edits, build, describe, edits_from_json, edits_to_json, history
from lightning_compress.layers import Chain
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.forms import (
    COMPACT,
    Circulant,
    CReLU,
    DepthwiseSeparable,
    Fire,
    Ghost,
    GroupedShuffle,
    Hashed,
    Rotated,
)
from lightning_compress.methods.forms.matching import gather_groups
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Moments
from lightning_compress.methods.replaceable import find_layers
from lightning_compress.methods.sequential import Fit, Planned, fit
from tests.networks import randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")

property_test = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])

FORMS: Mapping[str, Form] = {
    "separable": DepthwiseSeparable(),
    "separable, 2 filters": DepthwiseSeparable(rank=2),
    "ghost": Ghost(),
    "ghost, ratio 3": Ghost(ratio=3, kernel=1),
    "fire": Fire(),
    "fire, wide": Fire(squeeze=0.6, small=0.2),
    "grouped shuffle": GroupedShuffle(groups=2),
    "crelu": CReLU(),
    "rotated": Rotated(),
    "circulant": Circulant(block=2),
    "circulant, block 4": Circulant(block=4),
    "hashed": Hashed(ratio=4),
    "hashed, another seed": Hashed(ratio=2, seed=7),
}


@st.composite
def convolutions(draw: st.DrawFn, form: Form) -> nn.Module:
    """Convolutions with random weights, in double precision, of all kinds that a form can write and some others."""
    fire, shuffle, rotated = (isinstance(form, kind) for kind in (Fire, GroupedShuffle, Rotated))
    separable, structured = isinstance(form, DepthwiseSeparable), isinstance(form, Circulant | Hashed)
    sides = 2 if rotated else draw(st.sampled_from([1, 2, 2, 2, 3]))
    transposed = not fire and not rotated and not structured and draw(st.integers(0, 3)) == 0
    groups = 1 if fire or shuffle else draw(st.sampled_from([1, 1, 2]))
    kernels = ([1] if not (fire or rotated or separable) else []) + ([2] if not fire else []) + [3, 3]
    kernel = draw(st.sampled_from(kernels[:-1] if sides == 3 else kernels))
    dilation, stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    arguments: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    middle = dilation * (kernel - 1) // 2
    arguments["padding"] = middle if fire else draw(st.sampled_from([middle, middle, 0, 1]))
    if transposed:
        arguments["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    elif not rotated and not structured:
        arguments["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
    if stride == 1 and kernel % 2 and not transposed and draw(st.booleans()):
        arguments["padding"] = "same"
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{sides}d")
    torch.manual_seed(draw(st.integers(0, 999)))
    inputs = groups * draw(st.sampled_from([4, 8] if isinstance(form, Circulant) else [2, 4] if shuffle else [2, 3, 4]))
    outputs = groups * draw(
        st.sampled_from([4, 8] if rotated or isinstance(form, Circulant) else [2, 4, 6] if shuffle else [2, 3, 4, 5, 8])
    )
    return cast(nn.Module, kind(inputs, outputs, kernel, **arguments)).double()


def amounts_to(form: Form, module: nn.Module, second: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
    """What replaces a layer, and the layer that it should be the same as."""
    geometry = cast(Geometry, Geometry.of(module))
    assume(form.refuses(geometry) is None)
    weight, bias = geometry.canonical(cast(Tensor, module.weight).detach()), cast(Tensor | None, module.bias)
    (candidate, *_) = form.candidates(geometry, weight, second)
    factors = form.start(geometry, weight, candidate.rank, second)
    new, whole = build(form.spec(geometry, candidate.rank), weight), copy.deepcopy(module)
    assert describe(new) == form.spec(geometry, candidate.rank)
    with torch.no_grad():
        form.fill(geometry, new, factors, bias)
        cast(Tensor, whole.weight).copy_(geometry.native(form.compose(geometry, factors)))
    return new, whole


@pytest.mark.parametrize("name", FORMS)
@property_test
@given(draw=st.data(), data=st.booleans())
def test_what_is_composed_is_what_the_layers_give(name: str, draw: st.DataObject, data: bool) -> None:
    """With borders; of ghosts that have a middle tap only."""
    module = draw.draw(convolutions(FORMS[name]))
    geometry = cast(Geometry, Geometry.of(module))
    groups, _, rows = geometry.matrix
    patches = torch.randn(groups, rows, 3 * rows, dtype=torch.float64)
    new, whole = amounts_to(FORMS[name], module, patches @ patches.transpose(1, 2) / rows if data else None)
    x = torch.randn(2, geometry.inputs, *[7] * len(geometry.kernel), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(new(x), whole(x), atol=1e-10, rtol=1e-10)


class Net(nn.Module):
    """A layer on images that are smooth, as images are, with a norm behind it or not."""

    def __init__(self, layer: nn.Module, outputs: int, sides: int, norm: bool) -> None:
        super().__init__()
        self.layer = layer
        self.norm = getattr(nn, f"BatchNorm{sides}d")(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.layer(x)))


class Residual(nn.Module):
    """Convolutions with norms, one around which the input goes, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down((x + self.body(x)).relu())
        return cast(Tensor, self.head(x.mean((2, 3))))


def fitted(model: nn.Module, x: Tensor, form: Form, init: Init = "data") -> tuple[nn.Module, Fit]:
    """The network with every layer that can be replaced by a form."""
    calls = as_calls(x)
    found = find_layers(model, calls, {})
    planned = []
    for layer in found.found:
        if form.refuses(layer.geometry) is None:
            (candidate, *_) = form.candidates(layer.geometry, layer.weight, None)
            planned.append(Planned(layer, form, candidate.rank))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit(model, found, planned, calls, init, "test")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    new = copy.deepcopy(model)
    apply_edits(new, [result.edit])
    result.apply(new)
    return new, result


@pytest.mark.parametrize("name", FORMS)
@property_test
@given(draw=st.data(), norm=st.booleans(), seed=st.integers(0, 99))
def test_data_never_does_worse_than_the_weights_alone(name: str, draw: st.DataObject, norm: bool, seed: int) -> None:
    form = FORMS[name]
    module = draw.draw(convolutions(form))
    geometry = cast(Geometry, Geometry.of(module))
    assume(form.refuses(geometry) is None)
    torch.manual_seed(seed)
    sides = len(geometry.kernel)
    model = Net(module, geometry.outputs, sides, norm).double().eval()
    x = torch.randn(6, geometry.inputs, *[7] * sides, dtype=torch.float64).cumsum(-1).relu()
    new, result = fitted(model, x, form)
    with torch.no_grad():
        wanted, given_ = model.layer(x).transpose(0, 1).flatten(1), new.layer(x).transpose(0, 1).flatten(1)
        constant = geometry.bias or norm
        energy = (wanted - wanted.mean(1, keepdim=True) * constant).square().sum()
        left = wanted - given_
        left = (left - left.mean(1, keepdim=True) * (norm and not geometry.bias)).square().sum()
    assert result.errors["layer"] == pytest.approx(float(left / energy), abs=1e-6)
    layer = find_layers(model, as_calls(x), {}).found[0]
    moments = Moments(geometry)
    moments.add(x, cast(Tensor, model.layer(x)))
    plain = form.start(geometry, layer.weight, form.candidates(geometry, layer.weight, None)[0].rank, None)
    weights = moments.objective(layer.centred).error(form.compose(geometry, plain).flatten(2))
    assert result.errors["layer"] <= weights + 1e-9


@pytest.mark.parametrize("init", ["data", "weights", "random"])
@pytest.mark.parametrize("name", FORMS)
def test_a_network_with_norms_and_residuals(name: str, init: Init) -> None:
    """Every layer in turn; what comes out is replayed on a fresh network and gives the same."""
    form, model = FORMS[name], Residual().eval()
    randomize(model, 0)
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8).cumsum(-1).cumsum(-2) / 4
    reestimate_batchnorm(model, as_calls(x))
    new, result = fitted(model, x, form, init)
    assert result.errors
    assert all(0 <= error < (1 if init == "data" else math.inf) for error in result.errors.values())
    for path in result.edit.layers:
        chain = new.get_submodule(path)
        assert isinstance(chain, Chain)
        assert chain.form == form.name
    with torch.no_grad():
        after = new(x)
        assert after.isfinite().all()
        again = Residual().eval()
        apply_edits(again, edits_from_json(json.loads(json.dumps(edits_to_json(history(new))))))
        again.load_state_dict(new.state_dict())
        assert torch.equal(again(x), after)
    new(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_nearly_as_many_filters_as_taps_are_nearly_the_same() -> None:
    model = randomize(Residual(), 0).eval()
    x = torch.randn(64, 3, 8, 8).cumsum(-1).cumsum(-2) / 4
    reestimate_batchnorm(model, as_calls(x))
    new, _ = fitted(model, x, DepthwiseSeparable(rank=8))
    with torch.no_grad():
        before, after = model(x), new(x)
    assert (after - before).square().sum() < 0.02 * (before - before.mean(0)).square().sum()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("init", ["weights", "random"])
def test_without_data(name: str, init: Init) -> None:
    form, model = FORMS[name], nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).eval()
    found = find_layers(model, as_calls(torch.zeros(1, 4, 6, 6)), {})
    (candidate, *_) = form.candidates(found.found[0].geometry, found.found[0].weight, None)
    result = fit(model, found, [Planned(found.found[0], form, candidate.rank)], (), init, "test")
    apply_edits(model, [result.edit])
    result.apply(model)
    assert model(torch.zeros(1, 4, 6, 6)).isfinite().all()
    if init == "weights":
        assert result.errors["0"] == pytest.approx(candidate.error)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("degenerate", ["zero weight", "constant input", "equal outputs"])
def test_degenerate_layers(name: str, degenerate: str) -> None:
    form, model = FORMS[name], nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    layer = cast(nn.Conv2d, model[0])
    with torch.no_grad():
        if degenerate == "zero weight":
            layer.weight.zero_()
        if degenerate == "equal outputs":
            layer.weight.copy_(layer.weight[:1].clone())
    x = torch.ones(8, 4, 6, 6) if degenerate == "constant input" else torch.randn(8, 4, 6, 6)
    new, result = fitted(model, x, form)
    assert 0 <= result.errors["0"] < 1
    assert new(x).isfinite().all()


def conv(*arguments: int, **more: Any) -> nn.Module:
    return nn.Conv2d(*arguments, **more)


@pytest.mark.parametrize(
    ("form", "module", "reason"),
    [
        (DepthwiseSeparable(), nn.Linear(4, 4), "single tap"),
        (DepthwiseSeparable(), conv(4, 4, 1), "single tap"),
        (DepthwiseSeparable(), conv(4, 8, 3, groups=4), "depthwise already"),
        (DepthwiseSeparable(rank=9), conv(4, 8, 3), "no more than 9 taps"),
        (Ghost(), nn.Linear(4, 4), "no convolution"),
        (Ghost(), conv(4, 4, 3, groups=4), "one output for each group"),
        (CReLU(), nn.Linear(4, 4), "no convolution"),
        (CReLU(), conv(4, 1, 3), "one output for each group"),
        (Fire(), conv(4, 4, 1), "single tap"),
        (Fire(), conv(4, 4, 3, padding=1, groups=2), "grouped or transposed"),
        (Fire(), nn.ConvTranspose2d(4, 4, 3), "grouped or transposed"),
        (Fire(), conv(4, 4, 3), "tap in the middle"),
        (Fire(), conv(4, 4, 2, padding="same"), "tap in the middle"),
        (Fire(), conv(1, 4, 3, padding=1), "single channel"),
        (GroupedShuffle(), nn.Linear(4, 4), "no convolution"),
        (GroupedShuffle(), conv(8, 8, 3, groups=2), "groups already"),
        (GroupedShuffle(), conv(3, 8, 3), "do not make 4 groups"),
        (Rotated(), nn.Conv1d(4, 4, 3), "square kernel"),
        (Rotated(), conv(4, 4, 1), "square kernel"),
        (Rotated(), conv(4, 6, 3), "in fours"),
        (Rotated(), conv(4, 4, 2, padding="same"), "two sides"),
        (Rotated(), conv(4, 4, 3, padding_mode="reflect"), "pads with something else"),
        (Circulant(), conv(3, 8, 3), "3 inputs and 8 outputs: no multiples of the block, 4"),
        (Circulant(), nn.Linear(8, 10), "8 inputs and 10 outputs: no multiples of the block, 4"),
        (Circulant(), conv(8, 8, 3, groups=4), "2 inputs and 2 outputs of each group: no multiples"),
        (Circulant(), nn.ConvTranspose2d(4, 4, 3), "transposed or pads with something else"),
        (Hashed(), nn.ConvTranspose1d(4, 4, 3), "transposed or pads with something else"),
        (Hashed(), conv(4, 4, 3, padding_mode="circular"), "transposed or pads with something else"),
    ],
)
def test_what_cannot_be_written_is_refused_with_a_reason(form: Form, module: nn.Module, reason: str) -> None:
    assert reason in str(form.refuses(cast(Geometry, Geometry.of(module))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthwiseSeparable(rank=0), "`rank` must be an integer of at least 1, got 0"),
        (lambda: DepthwiseSeparable(rank=1.5), "`rank` must be an integer of at least 1, got 1.5"),
        (lambda: Ghost(ratio=1), "`ratio` must be an integer of at least 2, got 1"),
        (lambda: Ghost(kernel=2), "`kernel` must be odd, got 2"),
        (lambda: GroupedShuffle(groups=1), "`groups` must be an integer of at least 2, got 1"),
        (lambda: Circulant(block=1.5), "`block` must be an integer of at least 2, got 1.5"),
        (lambda: Circulant(block=1), "`block` must be an integer of at least 2, got 1"),
        (lambda: Hashed(ratio=1), "`ratio` must be an integer of at least 2, got 1"),
        (lambda: Hashed(ratio="8"), "`ratio` must be an integer of at least 2, got '8'"),
        (lambda: Hashed(seed=-1), "`seed` must be an integer of at least 0, got -1"),
        (lambda: Hashed(seed=1 << 64), r"`seed` must be below 2 \*\* 64, got 18446744073709551616"),
        (lambda: Fire(squeeze=0), r"`squeeze` must be in \(0, 1\], got 0"),
        (lambda: Fire(small=1), r"`small` must be in \(0, 1\), got 1"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_all_forms_are_listed_under_their_names() -> None:
    assert {name: kind.name for name, kind in COMPACT.items()} == {name: name for name in COMPACT}
    assert {type(form) for form in FORMS.values()} == set(COMPACT.values())


def test_the_number_of_filters_may_be_left_open() -> None:
    form, module = DepthwiseSeparable(rank=None), nn.Conv2d(4, 6, 3)
    geometry = cast(Geometry, Geometry.of(module))
    weight = geometry.canonical(module.weight.detach().double())
    candidates = form.candidates(geometry, weight, None)
    assert [candidate.rank for candidate in candidates] == [8, 7, 6, 5, 4, 3, 2, 1]
    errors = [candidate.error for candidate in candidates]
    assert errors == sorted(errors)
    for candidate in candidates:  # in the space of weights they are not a bound but the thing itself
        factors = form.start(geometry, weight, candidate.rank, None)
        left = (form.compose(geometry, factors) - weight).square().sum() / weight.square().sum()
        assert candidate.error == pytest.approx(float(left))


def test_opposite_filters_are_found() -> None:
    module = nn.Conv2d(3, 6, 3, bias=False)
    with torch.no_grad():
        module.weight[[4, 0, 5]] = -0.5 * module.weight[[1, 2, 3]]
    geometry = cast(Geometry, Geometry.of(module))
    (candidate,) = CReLU().candidates(geometry, geometry.canonical(module.weight.detach().double()), None)
    assert candidate.error < 1e-12


def test_rotations_are_found() -> None:
    module = nn.Conv2d(3, 12, 3, bias=False)
    with torch.no_grad():
        kernels = [torch.rot90(module.weight[i], turn, (-2, -1)) for i in range(3) for turn in range(4)]
        module.weight.copy_(torch.stack([kernels[i] for i in torch.randperm(12)]))
    geometry = cast(Geometry, Geometry.of(module))
    (candidate,) = Rotated().candidates(geometry, geometry.canonical(module.weight.detach().double()), None)
    assert candidate.error < 1e-12


def test_ghosts_of_filters_that_are_there_are_found() -> None:
    """Outputs that are small convolutions of others: not of their filters only, so the weights alone do not tell."""
    torch.manual_seed(0)
    primary = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).eval()
    layer, cheap = cast(nn.Conv2d, model[0]), torch.randn(4, 1, 3, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:4, :, 1:2, 1:2] = primary.weight
        layer.weight[4:] = cheap * primary.weight
    x = torch.randn(32, 3, 8, 8)
    found = fitted(model, x, Ghost())[1].errors["0"]
    assert found < 0.02  # the primary outputs have a bias, and zeros around them
    assert fitted(model, x, Ghost(), "weights")[1].errors["0"] > 3 * found


@property_test
@given(n=st.integers(1, 12), size=st.integers(2, 4), seed=st.integers(0, 99))
def test_groups_hold_every_item_once(n: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    table = gather_groups(torch.rand(n, n), size)
    assert table.shape == (-(-n // size), size)
    assert sorted(table[table >= 0].tolist()) == list(range(n))
    assert (table[:, 0] >= 0).all()


def test_groups_are_near_the_best_pairs() -> None:
    """All 15 pairings of 6 items, 50 times."""
    torch.manual_seed(0)
    ratios = []
    for _ in range(50):
        loss = torch.rand(6, 6)
        least = (loss + loss.T - (loss - loss.T).abs()) / 2  # whichever is the head
        table = gather_groups(loss, 2)
        best = min(
            float(least[0, a] + least[b, c] + least[d, e])
            for a in range(1, 6)
            for b, c, d, e in [
                (p[0], p[i], *(q for q in p[1:] if q != p[i]))
                for p in [sorted({1, 2, 3, 4, 5} - {a})]
                for i in (1, 2, 3)
            ]
        )
        ratios.append(float(loss[table[:, 0], table[:, 1]].sum()) / best)
    assert min(ratios) > 1 - 1e-6
    assert sum(ratios) / len(ratios) < 1.2
