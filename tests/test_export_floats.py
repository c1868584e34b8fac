"""Networks as they are in files; what files cannot hold; and code that is harder to write into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.calls import Call
from lightning_compress.exporting import ExportError, export
from lightning_compress.methods.posttraining import quantize
from lightning_compress.runtimes import OnnxNetwork, count_integers
from tests.contract.nets import Depthwise, Plain, Residual, conv
from tests.quantizing import Net, images, input_beside_what_is_made_of_it, net_of

onnx = pytest.importorskip("onnx", reason="needs ONNX")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")


@torch.no_grad()
def outputs(net: Any, *x: Tensor) -> Any:
    return net(*x)


def quantized(net: nn.Module, x: Tensor) -> nn.Module:
    quantize(net, x, target="vnni", rounding="nearest")
    return net


def test_strides_are_no_part_of_a_file(tmp_path: Path) -> None:
    net, x = net_of(Residual), images(6)
    export(net, tmp_path / "a.onnx", x)
    last = torch.channels_last
    export(net.to(memory_format=last), tmp_path / "b.onnx", x.contiguous(memory_format=last))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(("make", "format"), [(Plain, "onnx"), (Plain, "pt2"), (Depthwise, "onnx"), (Residual, "onnx")])
def test_floats(make: Callable[[], nn.Module], format: Any, tmp_path: Path) -> None:
    net, x, file = net_of(make), images(6), tmp_path / f"net.{format}"
    state = {key: value.clone() for key, value in net.state_dict().items()}
    parity = export(net.train(), file, x, format)
    assert net.training
    assert parity.samples == 6
    assert parity.agreement == 1.0
    assert parity.difference <= 1e-4
    network = OnnxNetwork(file) if format == "onnx" else torch.export.load(file).module()
    for size in (1, 3):
        assert torch.allclose(outputs(network, x[:size]), outputs(net.eval(), x[:size]), atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    if format == "onnx":
        assert count_integers(file).layers == 0
        assert count_integers(file).of == sum(isinstance(part, nn.Conv2d | nn.Linear) for part in net.modules())


def test_quantized_as_pt2(tmp_path: Path) -> None:
    x = images(64)
    net = quantized(net_of(Depthwise), x)
    parity = export(net, tmp_path / "net.pt2", x[:8], "pt2")
    assert parity.difference <= 1e-5
    again = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.allclose(outputs(again, x[:3]), outputs(net, x[:3]), atol=1e-5)


def test_weights_of_four_bits_may_be_stored_so(tmp_path: Path) -> None:
    net, x, sizes = net_of(Plain), images(64), []
    quantize(net, x, bits=4, ends=True, target="vnni", rounding="nearest")
    for int4 in (False, True):
        parity = export(net, tmp_path / "net.onnx", x, int4=int4)
        assert parity.relative < 0.02
        sizes.append((tmp_path / "net.onnx").stat().st_size)
        kinds = [t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer if len(t.dims) > 1]
        assert kinds == [onnx.TensorProto.INT4 if int4 else onnx.TensorProto.INT8] * 4
    assert sizes[0] - sizes[1] > 0.4 * sum(p.numel() for p in net.parameters() if p.dim() > 1)


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    net = quantized(net_of(Plain), images(64)).train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    keys = [list(part._buffers) for part in net.modules()]
    export(net, tmp_path / "net.onnx", images(1))  # a batch of one is no batch
    assert net.training
    assert [list(part._buffers) for part in net.modules()] == keys
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert OnnxNetwork(tmp_path / "net.onnx")(images(5)).shape == (5, 4)


class TestHarder:
    """Integers from end to end all the same."""

    def check(self, net: nn.Module, x: Tensor, path: Path, layers: int) -> None:
        quantized(net, x)
        wanted = outputs(net, x)
        export(net, path / "net.onnx", x)
        found = count_integers(path / "net.onnx")
        got = OnnxNetwork(path / "net.onnx")(x)
        for a, b in zip(
            [got] if isinstance(got, Tensor) else got, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True
        ):
            assert (a - b).square().mean() <= 0.01 * b.var()
        assert (found.layers, found.of) == (layers, layers), found.operations
        assert not found.islands, found.operations

    @input_beside_what_is_made_of_it
    def test_the_input_beside_what_is_made_of_it(self, run: Any, width: int, tmp_path: Path) -> None:
        net = net_of(lambda: Net(run, body=conv(3, 3), last=nn.Conv2d(width, 2, 1)))
        self.check(net, images(64, 3), tmp_path, 2)

    def test_arguments_by_name(self, tmp_path: Path) -> None:
        def run(self: Any, x: Tensor) -> Tensor:
            return F.linear(input=self.body(x).mean(dim=(2, 3)), weight=self.v)

        net = net_of(lambda: Net(run, body=conv(1, 8), v=nn.Parameter(torch.randn(4, 8))))
        self.check(net, images(64), tmp_path, 2)

    @pytest.mark.parametrize("equalization", [False, True])
    def test_what_raw_parameters_add(self, equalization: bool, tmp_path: Path) -> None:
        """By whatever names; one of them looks like the bias of the layer, and is not added at all."""

        def run(self: Any, x: Tensor) -> Tensor:
            return F.conv2d(F.relu(F.conv2d(x, self.first, self.shift)), self.weight, self.offset)

        torch.manual_seed(0)
        shapes = {"first": (8, 1, 3, 3), "shift": (8,), "weight": (4, 8, 3, 3), "offset": (4,), "bias": (4,)}
        net = Net(run, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}).eval()
        x = images(64)
        before = outputs(net, x)
        quantize(net, x, target="vnni", equalization=equalization)
        wanted = outputs(net, x)
        assert (wanted - before).square().mean() <= 0.002 * before.var()
        export(net, tmp_path / "net.onnx", x)
        got = OnnxNetwork(tmp_path / "net.onnx")(x)
        assert isinstance(got, Tensor)
        assert (got - wanted).square().mean() <= 0.001 * wanted.var()

    def test_several_outputs(self, tmp_path: Path) -> None:
        def run(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            features = self.body(x).mean((2, 3))
            return self.a(features), self.b(features), features

        net = net_of(lambda: Net(run, body=conv(1, 8), a=nn.Linear(8, 4), b=nn.Linear(8, 2)))
        self.check(net, images(64), tmp_path, 3)

    def test_a_norm_over_another_dim(self, tmp_path: Path) -> None:
        """Of sequences, BatchNorm1d takes the places to be its channels: nothing to fold."""
        layers = (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        net, x = net_of(lambda: nn.Sequential(*layers)), images(64)[:, 0]
        quantized(net, x)
        export(net, tmp_path / "net.onnx", x)
        got, wanted = OnnxNetwork(tmp_path / "net.onnx")(x), outputs(net, x)
        assert isinstance(got, Tensor)
        assert (got - wanted).square().mean() <= 0.01 * wanted.var()

    def test_on_floats_in_between(self, tmp_path: Path) -> None:
        """What runtimes do not compute with integers stays as it is; the layers do not."""
        layers = (conv(1, 8), nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 3, 1))
        net, x = net_of(lambda: nn.Sequential(*layers)), images(64)
        quantized(net, x)
        export(net, tmp_path / "net.onnx", x)
        found = count_integers(tmp_path / "net.onnx")
        assert (found.layers, found.of) == (4, 4), found.operations


class TestRefusals:
    @pytest.mark.parametrize("whole", [True, False])
    def test_an_operation_that_no_file_has(self, whole: bool, tmp_path: Path) -> None:
        def run(self: Any, x: Tensor) -> Tensor:
            y = self.head(self.body(x).mean((2, 3)))
            return y + torch.linalg.eigvals(x[:, 0]).real.mean(1, keepdim=True)

        net = net_of(lambda: Net(run, body=conv(1, 8), head=nn.Linear(8, 4)))
        if whole:
            quantized(net, images(16))
        with pytest.raises(ExportError, match=r"cannot be exported to ONNX.*eig"):
            export(net, tmp_path / "net.onnx", images(4))
        assert not (tmp_path / "net.onnx").exists()

    @pytest.mark.parametrize("format", ["onnx", "pt2"])
    def test_code_that_looks_at_values(self, format: Any, tmp_path: Path) -> None:
        net = net_of(lambda: Net(lambda self, x: self.a(x) if x.sum() > 0 else x, a=nn.Conv2d(1, 1, 1)))
        with pytest.raises(ExportError, match=r"cannot be exported: .*data-dependent"):
            export(net, tmp_path / "net", images(4), format)

    def test_two_calls(self, tmp_path: Path) -> None:
        net, x = net_of(Plain), images(4)
        with pytest.raises(ExportError, match="exported as it is called once"):
            export(net, tmp_path / "net.onnx", [Call((x,)), Call((x,))])
        with pytest.raises(ExportError, match="exported as it is called once"):
            export(net, tmp_path / "net.onnx", Call((x,), path="body"))

    def test_an_unknown_format(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`format` must be one of onnx, pt2, got 'tflite'"):
            export(net_of(Plain), tmp_path / "net", images(4), "tflite")  # type: ignore[arg-type]

    def test_a_file_that_computes_something_else(self, tmp_path: Path) -> None:
        """Randomness that evaluation does not take away."""
        net = net_of(lambda: Net(lambda self, x: self.a(x) * torch.rand_like(x), a=nn.Conv2d(1, 1, 1)))
        with pytest.raises(ExportError, match="computes something else than the network"):
            export(net, tmp_path / "net.onnx", images(4))
