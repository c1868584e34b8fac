"""Files for runtimes: integers from end to end, and what the network computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.exporting import export
from lightning_compress.grids import Grid
from lightning_compress.methods.posttraining import quantize
from lightning_compress.methods.quantization import quantized_weights
from lightning_compress.runtimes import OnnxNetwork, OpenVinoNetwork, count_integers
from tests.contract.nets import NETS, conv
from tests.networks import randomize
from tests.quantizing import Net

onnx = pytest.importorskip("onnx", reason="needs ONNX")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")


def after(net: nn.Module, change: Callable[[Any], None]) -> nn.Module:
    """A random network with something odd about it."""
    randomize(net)
    with torch.no_grad():
        change(net)
    return net


def joined() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1))

    return Net(run, a=conv(1, 8), b=conv(1, 4, size=1), last=nn.Conv2d(12, 3, 1))


def mobile() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.n2(self.depth(self.act(self.n1(self.expand(x))))))
        x = x + self.n3(self.project(y))
        return self.head(self.drop(self.pool(x).flatten(1)))

    layers = {
        "stem": conv(1, 8),
        "expand": nn.Conv2d(8, 24, 1, bias=False),
        "n1": nn.BatchNorm2d(24),
        "act": nn.ReLU6(),
    }
    layers |= {"depth": nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), "n2": nn.BatchNorm2d(24)}
    layers |= {"project": nn.Conv2d(24, 8, 1, bias=False), "n3": nn.BatchNorm2d(8), "pool": nn.AdaptiveAvgPool2d(1)}
    return Net(run, **layers, drop=nn.Dropout(0.2), head=nn.Linear(8, 4))


def perceptron() -> nn.Module:
    layers = (
        nn.Linear(64, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, 16),
        nn.ReLU(),
    )
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 4))


def pooled() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(self.a(x), 3, 1, 1), 2)
        return self.head(F.adaptive_avg_pool2d(self.b(x), 1)[:, :, 0, 0])

    return Net(run, a=conv(1, 8), b=conv(8, 8), head=nn.Linear(8, 4))


def shuffled() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, 1)
        x = torch.cat([a, self.b(b)], 1)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.last(x)

    return Net(run, a=conv(1, 8), b=conv(4, 4), last=nn.Conv2d(8, 3, 1, bias=False))


def twice() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        return self.last(F.relu(self.layer(F.relu(self.layer(x)))))

    return Net(run, stem=nn.Conv2d(1, 8, 1), layer=nn.Conv2d(8, 8, 3, padding=1), last=nn.Conv2d(8, 3, 1))


def norms(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    return lambda: after(nn.Sequential(conv(1, 8), conv(8, 8), nn.Conv2d(8, 3, 1)), change)


def odd_channels(net: Any) -> None:
    """Scales below zero and of zero, weights of zero, before and after a BatchNorm, and without."""
    net[1][1].weight[:4] *= -1
    net[0][1].weight[2] = 0
    net[1][1].weight[5] = 0
    net[1][0].weight[3] = 0
    net[2].weight[1] = 0


def odd_sizes(net: Any) -> None:
    """Biases beside which weights are nothing, and steps that are near nothing."""
    net[1][0].weight[3] *= 1e-9
    net[1][1].bias[3] = 30.0
    net[2].bias[0] = 1000.0
    net[0][0].weight *= 1e-6
    net[0][1].running_mean *= 1e-6
    net[0][1].running_var *= 1e-12
    net[0][1].eps = 0.0


def zeros(net: Any) -> None:
    net[1][0].weight.zero_()


ODD = {"odd channels": norms(odd_channels), "odd sizes": norms(odd_sizes), "a layer of zeros": norms(zeros)}
ENDED_BY_CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "concatenation": joined,
    "channel shuffle": shuffled,
    "a layer called twice": twice,
    **ODD,
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    **NETS,
    "inverted bottleneck": mobile,
    "perceptron": perceptron,
    "pools": pooled,
}
ALL = {**ENDED_BY_CONVOLUTIONS, **CLASSIFIERS}
every_net = pytest.mark.parametrize("name", ALL)


def images(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    """With random statistics, unless it has its own."""
    torch.manual_seed(0)
    net = ALL[name]()
    return (net if name in ODD else randomize(net)).eval()


Exported = Callable[..., tuple[nn.Module, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A quantized network and its file, made once for all tests, which leave them as they are."""

    @cache
    def make_file(name: str, **precision: Any) -> tuple[nn.Module, Path]:
        net, file = make(name), tmp_path_factory.mktemp("onnx") / "net.onnx"
        quantize(net, images(), **{"target": "vnni", "rounding": "corrected", **precision})
        export(net, file, images(48, 1))
        return net, file

    return make_file


@torch.no_grad()
def outputs(net: Any, x: Tensor) -> Tensor:
    return net(x)


def last_step(net: nn.Module, path: str) -> float:
    return float(net.get_buffer(f"{path}.conv2d_0_step".lstrip(".")))


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "vnni") for name in ENDED_BY_CONVOLUTIONS), ("concatenation", "gpu")]
)
def test_within_a_step_of_the_network(name: str, target: str, exported: Exported) -> None:
    """Sums of integers are exact, and rounded where sums of floats are but at the edges."""
    net, file = exported(name, target=target)
    x = images(40, 2)
    wanted, got = outputs(net, x), OnnxNetwork(file)(x)
    last = [path for path, part in net.named_modules() if isinstance(part, nn.Conv2d)][-1]
    step = last_step(net, last)
    whole = (got - wanted).abs() / step
    assert (whole < 1.01).float().mean() >= 0.99
    assert (whole < 0.01).float().mean() >= 0.9
    assert torch.allclose(got / step, (got / step).round(), atol=0.01)


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "vnni") for name in CLASSIFIERS), ("inverted bottleneck", "gpu")],
)
def test_the_same_answers(name: str, target: str, exported: Exported) -> None:
    net, file = exported(name, target=target)
    x = images(100, 2)
    wanted, got = outputs(net, x), OnnxNetwork(file)(x)
    assert (wanted.argmax(1) == got.argmax(1)).float().mean() >= 0.97
    assert (got - wanted).square().mean() <= 0.01 * wanted.var(0).mean()


@every_net
def test_integers_from_end_to_end(name: str, exported: Exported) -> None:
    net, file = exported(name)
    found = count_integers(file)
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in net.modules())
    assert found.layers == found.of == layers + (name == "a layer called twice"), found.operations
    assert not found.islands, found.operations
    assert str(found) == f"int8 {found.layers} of {found.of}"


@every_net
def test_any_batch_size(name: str, exported: Exported) -> None:
    _, file = exported(name)
    network, x = OnnxNetwork(file), images(8)
    whole = network(x)
    for size in (1, 3):
        assert torch.allclose(network(x[:size]), whole[:size], atol=1e-5)


@pytest.mark.parametrize(("name", "bits"), [*((name, 8) for name in ALL), ("a layer called twice", 3)])
def test_weights_are_stored_as_integers(name: str, bits: int, exported: Exported) -> None:
    """Those of the network; and nothing of the size of a weight as floats."""
    net, file = exported(name, **({} if bits == 8 else {"bits": bits, "ends": True}))
    stored = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    kinds = onnx.TensorProto
    whole = [onnx.numpy_helper.to_array(t) for t in stored.values() if t.data_type == kinds.INT8 and len(t.dims) > 1]
    sizes = sorted(p.numel() for p in net.parameters() if p.dim() > 1)
    outputs_of = max(len(p) for p in net.parameters())
    floats = [t.name for t in stored.values() if t.data_type == kinds.FLOAT and max(t.dims, default=1) > outputs_of]
    assert not floats
    assert sorted({w.size for w in whole}) == sorted(set(sizes))
    limit = 2 ** (bits - 1) - 1
    assert all(abs(w.astype(int)).max() <= limit for w in whole)
    assert sum(w.size for w in whole) <= sum(sizes) * (2 if name == "a layer called twice" else 1)


@pytest.mark.parametrize("name", ["odd channels"])
def test_seven_bits_for_processors_whose_sums_saturate(name: str, exported: Exported) -> None:
    net, file = exported(name, target="avx2")
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer]
    whole = [w for w in stored if w.dtype == "int8" and w.ndim > 1]
    assert len(whole) == len(quantized_weights(net))
    assert all(-63 <= int(w.min()) <= int(w.max()) <= 63 for w in whole)
    assert max(int(w.max()) for w in whole) > 31
    assert all(grid == Grid.signed(7) for *_, grid in quantized_weights(net))


@pytest.mark.parametrize("name", ["inverted bottleneck", "concatenation"])
def test_symmetric_for_gpus(name: str, exported: Exported) -> None:
    """Every quantizer is int8 around zero."""
    _, file = exported(name, target="gpu")
    graph = onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [stored[node.input[2]] for node in kinds if len(node.input) > 2]
    assert zeros
    assert all(not zero.any() for zero in zeros)
    assert {zero.dtype.name for zero in zeros} <= {"int8", "int32"}


@pytest.mark.parametrize(
    ("name", "target"),
    [("residual", "vnni"), ("inverted bottleneck", "vnni"), ("inverted bottleneck", "gpu")],
)
def test_values_of_four_bits_are_clipped_as_in_the_network(name: str, target: str, exported: Exported) -> None:
    net, file = exported(name, value_bits=4, target=target)
    x = 3 * images(60, 2)  # beyond what was seen
    wanted, got = outputs(net, x), OnnxNetwork(file)(x)
    assert (got - wanted).square().mean() <= 0.01 * wanted.var()
    assert (got.argmax(1) == wanted.argmax(1)).float().mean() >= 0.95


@pytest.mark.parametrize("name", ["residual", "depthwise", "inverted bottleneck", "concatenation"])
def test_openvino(name: str, exported: Exported) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO")
    net, file = exported(name)
    x = images(50, 2)
    wanted, got = outputs(net, x), OpenVinoNetwork(file)(x)
    assert isinstance(got, Tensor)
    assert (got - wanted).square().mean() <= 0.01 * wanted.var()
