"""Runtimes that exported networks run in: ONNX Runtime, and OpenVINO where it is installed."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Integers", "OnnxNetwork", "OpenVinoNetwork", "count_integers"]

INTEGER = {
    *("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
    *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearSigmoid"),
    *("QLinearLeakyRelu", "QLinearSoftmax", "QLinearReduceMean"),
}
LAYERS = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
FLOAT_LAYERS = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"}
FLOAT_OTHERS = {"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "Sigmoid", "Relu", "Clip", "ReduceMean"}


class OnnxNetwork:
    """A file in ONNX Runtime, on the CPU.

    Args:
        path: the file.
        threads: within an operation; None: as many as the runtime takes.
        optimized: where to write the graph that the runtime made of it.

    Raises:
        ImportError: ONNX Runtime is not installed.

    Example:
        >>> from torch import nn
        >>> from lightning_compress import export
        >>> net, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(net, Path(folder, "net.onnx"), x)
        ...     torch.allclose(OnnxNetwork(Path(folder, "net.onnx"))(x), net(x), atol=1e-5)
        True
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, optimized: Path | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"{error}; install lightning-compress[export]") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every graph that is written out
        if threads is not None:
            options.intra_op_num_threads = threads
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives; tensors of any shape that it takes, on the CPU."""
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        outputs = tuple(torch.from_numpy(array) for array in self._session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs


class OpenVinoNetwork:
    """A file in OpenVINO, on the CPU.

    Args:
        path: an ONNX file.
        threads: that it computes with; None: as many as the runtime takes.

    Raises:
        ImportError: OpenVINO is not installed.

    Example:
        >>> OpenVinoNetwork("net.onnx")(torch.randn(4, 3)).shape  # doctest: +SKIP
        torch.Size([4, 2])
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError(f"{error}; install lightning-compress[openvino]") from error
        options = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._compiled = openvino.Core().compile_model(os.fspath(path), "CPU", options)

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives; tensors of any shape that it takes, on the CPU."""
        found = self._compiled([tensor.numpy() for tensor in inputs])
        outputs = tuple(torch.from_numpy(array.copy()) for array in found.values())
        return outputs[0] if len(outputs) == 1 else outputs


@dataclass(frozen=True)
class Integers:
    """What a runtime computes with integers.

    Attributes:
        layers: convolutions and linear layers that do.
        of: how many there are.
        islands: operation -> how often it is carried out on floats, of those that could be on integers.
        operations: operation -> how often.
    """

    layers: int
    of: int
    islands: Mapping[str, int]
    operations: Mapping[str, int]

    def __str__(self) -> str:
        return f"int8 {self.layers} of {self.of}"


def count_integers(path: str | os.PathLike[str]) -> Integers:
    """Count, in the graph that ONNX Runtime makes of a file, what it computes with integers.

    Args:
        path: an ONNX file.

    Example:
        >>> from torch import nn
        >>> from lightning_compress import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(nn.Linear(3, 2), Path(folder, "net.onnx"), torch.randn(4, 3))
        ...     str(count_integers(Path(folder, "net.onnx")))
        'int8 0 of 1'
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        OnnxNetwork(path, 1, optimized)
        graph = onnx.load(optimized).graph
    operations = Counter(node.op_type for node in graph.node)
    layers = sum(operations[name] for name in LAYERS)
    floats = {name: count for name, count in operations.items() if name in FLOAT_LAYERS | FLOAT_OTHERS}
    of = layers + sum(operations[name] for name in FLOAT_LAYERS)
    return Integers(layers, of, floats, dict(operations))
