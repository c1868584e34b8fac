"""Block-circulant and hashed layers: what they are, what they cost, and how they are found from trained layers."""

from __future__ import annotations

import copy
import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from lightning_compress import Budget
from lightning_compress.artifact import load_compressed, save_compressed
from lightning_compress.budget import BudgetError
from lightning_compress.calls import as_calls
from lightning_compress.coupling import trace_coupling
from lightning_compress.edits import apply_edits, describe, history, skeleton
from lightning_compress.footprint import measure
from lightning_compress.hashing import hash_codes, splitmix64
from lightning_compress.layers import Chain
from lightning_compress.methods.approximation import approximate
from lightning_compress.methods.filters import compact_filters
from lightning_compress.methods.forms import Circulant as CirculantForm
from lightning_compress.methods.forms import Hashed as HashedForm
from lightning_compress.methods.forms import hashed
from lightning_compress.methods.forms.structured import Structured as StructuredForm
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Objective
from lightning_compress.methods.pricing import price
from lightning_compress.methods.pruning import prune_channels
from lightning_compress.structured import Circulant, Hashed, Structured, by_fft
from tests.contract.nets import NETS
from tests.networks import RandomNetwork, networks

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

property_test = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

X = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@st.composite
def structured(draw: st.DrawFn, kind: type[Structured]) -> tuple[Structured, Tensor]:
    """A layer in double precision, and an input: of a linear layer or a convolution, with a batch or without."""
    sides = draw(st.integers(0, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(sides))
    groups = draw(st.integers(1, 2)) if sides else 1
    block = draw(st.integers(1, 9))
    inputs, outputs = (groups * block * draw(st.integers(1, 3)) for _ in range(2))
    sizes: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if sides:
        stride = tuple(draw(st.integers(1, 2)) for _ in range(sides))
        same = all(step == 1 for step in stride) and draw(st.booleans())
        padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(sides))
        dilation = tuple(draw(st.integers(1, 2)) for _ in range(sides))
        sizes |= {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    torch.manual_seed(draw(st.integers(0, 999)))
    layer: Structured
    if kind is Circulant:
        layer = Circulant(inputs, outputs, block, **sizes)
    else:
        weights = outputs * inputs // groups * math.prod(kernel)
        layer = Hashed(inputs, outputs, draw(st.integers(1, weights)), draw(st.integers(0, 2**64 - 1)), **sizes)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    batch = draw(st.sampled_from([(), (2,)] if sides else [(), (2,), (2, 3)]))
    shape = (*batch, inputs, *[6] * sides)
    return layer.double(), torch.randn(shape, dtype=torch.float64)


def plain(layer: Structured, x: Tensor, weight: Tensor) -> Tensor:
    """What the plain layer of torch with a weight gives."""
    if not layer.kernel_size:
        return F.linear(x, weight, layer.bias)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    y: Tensor = convolve(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[operator]
    return y


@property_test
@given(drawn=structured(Circulant))
def test_a_circulant_layer_is_its_dense_weight_by_either_way(drawn: tuple[Circulant, Tensor]) -> None:
    """The values and the gradients; the weight is checked entry by entry, for one is made of the other."""
    layer, x = drawn
    dense, block = layer.dense_weight(), layer.block
    for row, column in [(0, 0), (0, dense.shape[1] - 1), (dense.shape[0] - 1, 0), (block - 1, block // 2)]:
        vector = layer.weight[row // block, column // block]
        assert torch.equal(dense[row, column], vector[(row - column) % block])
    results = []
    for way in (lambda: plain(layer, x, layer.dense_weight()), lambda: layer(x), lambda: layer.spectral(x)):
        y = way()
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for found in results[1:]:
        for value, wanted in zip(found, results[0], strict=True):
            torch.testing.assert_close(value, wanted, atol=1e-9, rtol=1e-9)


@property_test
@given(drawn=structured(Hashed))
def test_a_hashed_layer_is_its_dense_weight(drawn: tuple[Hashed, Tensor]) -> None:
    layer, x = drawn
    values = layer.weight.tolist()
    drawn_codes = hash_codes(layer.codes.numel(), layer.values, layer.seed)
    wanted = torch.tensor([-values[c - len(values)] if c >= len(values) else values[c] for c in drawn_codes])
    assert torch.equal(layer.dense_weight().flatten(), wanted.double())
    torch.testing.assert_close(layer(x), plain(layer, x, layer.dense_weight()), atol=0, rtol=0)


def test_blocks_of_one_are_the_layer_itself() -> None:
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1)
    layer = Circulant(6, 4, 1, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    with torch.no_grad():
        layer.weight.copy_(conv.weight[:, :, None])
        cast(Tensor, layer.bias).copy_(cast(Tensor, conv.bias))
    x = torch.randn(2, 6, 7, 7)
    assert torch.equal(layer(x), conv(x))


def test_as_many_values_as_weights_are_not_the_layer_itself() -> None:
    """They collide: a hash leaves 1 / e of them out. A number of its own for each would be no hash."""
    codes = hash_codes(100_000, 100_000) % 100_000
    assert len(set(codes.tolist())) / 100_000 == pytest.approx(1 - 1 / math.e, abs=0.005)


def test_the_hash_is_splitmix64() -> None:
    """Against the numbers that are published for its seed 1234567, and by the definition in Python's integers."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(4, 1234567).tolist() == published
    seed, count, values = 2**64 - 5, 20, 7
    for index, code in enumerate(hash_codes(count, values, seed).tolist()):
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        assert code == (z >> 1) % values + values * (z & 1)


def test_the_hash_is_even_and_the_same_in_another_process() -> None:
    codes = hash_codes(64_000, 16, seed=3)
    counts = torch.bincount(torch.from_numpy(codes), minlength=32)
    assert counts.min() > 1700  # of 2000; half of them are negative
    assert counts.max() < 2300
    program = (
        "from lightning_compress.hashing import hash_codes; import hashlib;"
        "print(hashlib.sha256(hash_codes(64_000, 16, seed=3).astype('<i4').tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()


# What they cost.

LAYERS: dict[str, tuple[nn.Module, Tensor, tuple[int, tuple[int, ...]]]] = {
    "linear, by FFT": (Circulant(256, 128, 16), torch.randn(2, 256), (1, ())),
    "linear, five rows, by FFT": (Circulant(256, 128, 8), torch.randn(2, 5, 256), (5, ())),
    "convolution, by FFT": (
        Circulant(128, 256, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
        torch.randn(2, 128, 9, 9),
        (1, (9, 9)),
    ),
    "groups, by FFT": (Circulant(256, 512, 32, kernel_size=(3,), groups=2), torch.randn(2, 256, 7), (1, (7,))),
    "small": (Circulant(16, 8, 4, kernel_size=(3, 3)), torch.randn(2, 16, 9, 9), (1, (9, 9))),
    "linear, small": (Circulant(16, 8, 8), torch.randn(2, 16), (1, ())),
    "hashed": (Hashed(16, 8, 100, kernel_size=(3, 3)), torch.randn(2, 16, 9, 9), (1, (9, 9))),
    "hashed linear": (Hashed(16, 8, 30), torch.randn(2, 16), (1, ())),
}


@pytest.mark.parametrize("case", LAYERS)
def test_price_footprint_and_coupling_agree(case: str) -> None:
    """And none is below what is multiplied: of spectra, half of the frequencies, 3 or 4 real products for a complex."""
    layer, x, place = LAYERS[case]
    assert isinstance(layer, Structured)
    footprint = measure(layer, x)
    assert price(cast(Any, describe(layer)), [place]).macs == footprint.macs
    assert price(cast(Any, describe(layer)), [place]).params == footprint.params
    coupling = trace_coupling(layer, x)
    assert coupling.macs(coupling.nothing_cut()) == pytest.approx(footprint.macs)
    positions = layer(x).numel() // len(x) // layer.out_channels
    dense = positions * layer.dense_weight().numel()
    if "FFT" not in case:
        assert footprint.macs == dense
        return
    assert isinstance(layer, Circulant)
    products = (3 if layer.kernel_size else 4) * (layer.block // 2 + 1) * dense / layer.block**2
    assert products < footprint.macs < dense
    assert not {"aten._fft_r2c", "aten._fft_c2r"} & set(footprint.uncounted)


def test_parameters_are_counted_to_the_last() -> None:
    assert Circulant(12, 8, 4, kernel_size=(3, 3), groups=1).weight.numel() == 12 * 8 * 9 // 4
    net: nn.Module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 12))
    before = sum(p.numel() for p in net.parameters())
    sizes = [4 * 8 * 9, 8 * 8 * 9, 128 * 12]
    for operator, options, left in (
        ("circulant", {"block": 4}, [size // 4 for size in sizes]),
        ("hashed", {"ratio": 5}, [-(-size // 5) for size in sizes]),
    ):
        new = copy.deepcopy(net)
        done = compact_filters(new, torch.randn(32, 4, 8, 8), operator, **options)
        assert list(done.ranks.values()) == left
        assert done.costs["params"] == (before, before - sum(sizes) + sum(left))
        assert done.costs["macs"][0] == done.costs["macs"][1]


def test_wide_layers_get_fewer_macs_and_a_budget_of_them() -> None:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    x = torch.randn(32, 64)
    dense = measure(net, x).macs
    done = compact_filters(net, x, "circulant", Budget(macs=0.65), block=16)
    assert list(done.ranks) == ["2"]
    assert done.costs["macs"] == (dense, measure(net, x).macs)
    assert measure(net, x).macs <= 0.65 * dense


@pytest.mark.parametrize(("operator", "options"), [("hashed", {"ratio": 8}), ("circulant", {"block": 4})])
def test_budgets(operator: str, options: dict[str, int]) -> None:
    """Of parameters and bytes; of multiply-accumulates they are refused, where there are no fewer."""
    for unit in ("params", "bytes"):
        net = NETS["plain"]()
        dense = getattr(measure(net, X), unit)
        compact_filters(net, X, operator, Budget(**{unit: 0.7}), **options)
        assert getattr(measure(net, X), unit) <= 0.7 * dense
    net = NETS["plain"]()
    with pytest.raises(
        BudgetError, match=r"lowest reachable .* fewer weights but compute as much; give a budget of pa"
    ):
        compact_filters(net, X, operator, Budget(macs=0.7), **options)
    assert not history(net)


# How they are found.


@pytest.mark.parametrize("form", [CirculantForm(block=4), HashedForm(ratio=4), HashedForm(ratio=3, seed=9)], ids=str)
@pytest.mark.parametrize("module", [nn.Conv2d(8, 16, (3, 2), groups=2), nn.Linear(16, 8)], ids=["conv", "linear"])
def test_both_beginnings_are_the_best(form: StructuredForm, module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dense least squares on the map from numbers to weights, in the space of weights and in that of data."""
    torch.manual_seed(0)
    geometry = cast(Geometry, Geometry.of(module))
    weight = geometry.canonical(cast(Tensor, module.weight).detach().double())
    groups, outputs, rows = geometry.matrix
    patches = torch.randn(groups, rows, 4 * rows, dtype=torch.float64) * torch.rand(groups, rows, 1).double()
    second = patches @ patches.transpose(1, 2) / (4 * rows)
    rank = form.rank(geometry)
    shape = form.start(geometry, weight, rank, None)[0].shape
    units = torch.eye(shape.numel(), dtype=torch.float64)
    linear = torch.stack([form.compose(geometry, (unit.view(shape),)).flatten() for unit in units], 1)
    metric = torch.block_diag(*[block for block in second for _ in range(outputs)])
    for moments, matrix in ((None, torch.eye(len(linear), dtype=torch.float64)), (second, metric)):
        best = torch.linalg.pinv(linear.T @ matrix @ linear) @ linear.T @ matrix @ weight.flatten()
        found = form.compose(geometry, form.start(geometry, weight, rank, moments)).flatten()
        torch.testing.assert_close(found, linear @ best, atol=1e-6, rtol=1e-6)
    cross = weight.flatten(2) @ second
    objective = Objective(second, cross, float((cross * weight.flatten(2)).sum()), None, 1e-9)
    exact = objective.error(form.compose(geometry, form.start(geometry, weight, rank, second)).flatten(2))
    assert approximate(form, geometry, weight, rank, objective)[1] == pytest.approx(exact, rel=1e-6)
    monkeypatch.setattr(hashed, "EXACT_VALUES", 0)  # by conjugate gradients
    assert approximate(form, geometry, weight, rank, objective)[1] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("operator", "options"), [("circulant", {"block": 2}), ("hashed", {"ratio": 4})])
def test_data_beats_weights_beats_nothing(operator: str, options: dict[str, int]) -> None:
    """At the output of the whole network, on other data than that of the calibration."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    mix = torch.randn(16, 16) / torch.arange(1, 17)
    x, other = torch.randn(256, 16) @ mix, torch.randn(64, 16) @ mix
    found = {}
    for init in ("data", "weights", "random"):
        model = copy.deepcopy(net)
        compact_filters(model, x, operator, init=init, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            found[init] = float((model(other) - net(other)).norm())
    assert found["data"] < found["weights"] < found["random"]


def test_few_samples_do_not_lead_astray() -> None:
    """As many equations as unknowns, which the least squares without a ridge solve exactly, and at any price."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    new, other = copy.deepcopy(net), torch.randn(512, 64)
    compact_filters(new, torch.randn(32, 64), "circulant", block=2)
    with torch.no_grad():
        wanted = net(other)
        assert (new(other) - wanted).norm() < 4 * wanted.norm()  # 23 times without


# What else they go through.

BOTH = pytest.mark.parametrize(("operator", "options"), [("circulant", {"block": 2}), ("hashed", {"ratio": 4})])


@BOTH
@pytest.mark.parametrize("name", NETS)
def test_files_hold_the_numbers_and_nothing_else(
    name: str, operator: str, options: dict[str, int], tmp_path: Path
) -> None:
    model = NETS[name]().eval()
    done = compact_filters(model, X, operator, **options)
    save_compressed(model, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "codes" in key]  # noqa: SIM118
    again = load_compressed(tmp_path / "net.safetensors", NETS[name]())
    assert torch.equal(again(X), model(X))
    paths = list(done.ranks)
    assert all(isinstance(cast(Chain, again.get_submodule(path))[0], Circulant | Hashed) for path in paths)
    bare = skeleton(NETS[name]())
    apply_edits(bare, history(model))
    assert [(key, value.shape) for key, value in bare.state_dict().items()] == [
        (key, value.shape) for key, value in model.state_dict().items()
    ]
    assert measure(bare, X.to("meta")).macs == measure(model, X).macs


@BOTH
@pytest.mark.parametrize("pruned_first", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_composes_with_channel_pruning(
    name: str, pruned_first: bool, operator: str, options: dict[str, int], tmp_path: Path
) -> None:
    """What is pruned around them is proved; circulant layers that are not computed by FFT lose whole blocks."""
    torch.manual_seed(0)
    model = NETS[name]().eval()
    dense = measure(model, X)
    body = {"plain": "body", "residual": "[!h]*", "depthwise": "[!h]*"}[name]
    exclude = [body] if operator == "hashed" else []  # hashed layers everywhere would leave no channel to cut
    steps = [
        lambda: prune_channels(model, X[:4], ratio=0.25, calibration=as_calls(X)),
        lambda: compact_filters(model, X[:4], operator, calibration=as_calls(X), exclude=exclude, **options),
    ]
    for step in steps if pruned_first else reversed(steps):
        assert step().edits
    assert measure(model, X).params < 0.8 * dense.params
    for module in model.modules():
        if isinstance(module, Circulant):
            inputs, outputs = module.dense_weight().shape[1] * module.groups, len(module.dense_weight())
            assert (module.in_channels, module.out_channels) == (inputs, outputs)
    save_compressed(model, tmp_path / "net.safetensors")
    assert torch.equal(load_compressed(tmp_path / "net.safetensors", NETS[name]())(X), model(X))


def test_channels_around_an_fft_are_left_alone_with_a_reason() -> None:
    net = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(32, 16)
    compact_filters(net, x, "circulant", block=8, exclude=["0", "4"])
    assert "is transformed by _fft_r2c in 2.0" in trace_coupling(net, x).reasons["0.weight[0]"]
    with pytest.raises(ValueError, match=r"no channel in this network that could be cut: .*transformed by _fft_r2c"):
        prune_channels(net, x, ratio=0.3)


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(drawn=networks())
def test_random_networks_survive(drawn: tuple[RandomNetwork, Tensor]) -> None:
    """Groups, shuffles, splits, ties, norms: smaller or untouched, and what was done replays; then channels are cut."""
    network, x = drawn
    before = measure(network, x)
    for operator, options in (("circulant", {"block": 2}), ("hashed", {"ratio": 3})):
        model = copy.deepcopy(network).eval()
        try:
            done = compact_filters(model, x, operator, **options)
        except ValueError as error:  # nothing but depthwise layers, or odd widths
            if "no layer in this network" not in str(error):
                raise
            continue
        after = measure(model, x)
        assert after.params <= before.params
        assert after.macs == before.macs  # these are too narrow for FFTs
        assert all(error >= 0 for error in done.errors.values())
        fresh = copy.deepcopy(network).eval()
        apply_edits(fresh, done.edits)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(fresh(x), model(x))
        coupling = trace_coupling(model, x)
        if coupling.groups:
            prune_channels(model, x, ratio=0.3)
            assert model(x).isfinite().all()


@pytest.mark.parametrize("layer", [Circulant(128, 128, 8), Circulant(128, 128, 8, kernel_size=(3, 3))], ids=repr)
def test_what_is_exported_has_no_complex_numbers(layer: Circulant) -> None:
    x = torch.randn(2, 128, *[5] * len(layer.kernel_size))
    assert layer.fast
    program = torch.export.export(layer.eval(), (x,))
    assert not [node for node in program.graph.nodes if "fft" in str(node.target)]
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [Circulant(128, 128, 8), Hashed(16, 8, 40)], ids=repr)
def test_onnx(layer: Structured, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, layer.in_channels)
    torch.onnx.export(layer.eval(), (x,), tmp_path / "layer.onnx", input_names=["x"], verbose=False)
    (y,) = runtime.InferenceSession(tmp_path / "layer.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [Circulant(128, 128, 16), Circulant(128, 128, 8, kernel_size=(3, 3))], ids=repr)
def test_half_precision(layer: Circulant) -> None:
    """There is no FFT of it: what is computed is at least as near the truth as the dense weight's."""
    layer = copy.deepcopy(layer)
    x = torch.randn(2, 128, *[5] * len(layer.kernel_size))
    with torch.no_grad():
        wanted = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), wanted, atol=0.05, rtol=0.05)
        y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Circulant(6, 8, 4), "circulant blocks of 4 do not divide 6 channels in and 8 out of each group"),
        (lambda: Circulant(8, 8, 8, kernel_size=(3,), groups=2), "blocks of 8 do not divide 4 channels in and 4 out"),
        (lambda: Circulant(6, 8, 2, kernel_size=(3,), groups=4), "4 groups do not divide 6 channels in and 8 out"),
        (lambda: Hashed(4, 4, 0), "0 values cannot stand for 16 weights"),
        (lambda: Hashed(4, 4, 17), "17 values cannot stand for 16 weights"),
    ],
)
def test_sizes_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_which_layers_compute_by_fft() -> None:
    assert by_fft(128, 128, 8)
    assert not by_fft(128, 128, 4)
    assert not by_fft(120, 128, 8)
    assert not by_fft(132, 132, 12)  # no power of two
    assert not by_fft(128, 256, 8, groups=2)
