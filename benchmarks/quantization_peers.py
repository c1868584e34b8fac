"""The peers of the int8 benchmark: what each makes of a trained network and a few batches, run by its own runtime.

Every function takes the network (float, in evaluation mode; it stays as it is), batches of images, a folder for files,
and the threads of its runtime. Settings are the peer's defaults unless a comment says why not. NNCF's ranges are means
over the batches of each batch's extremes, so that they depend on the batch size.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantization_peers_common import INPUT, Peer, export, export_traced, onnx_peer, quiet
from lightning_compress.methods.targets import TARGETS, this_machine

__all__ = [
    "PEERS",
    "Peer",
    "brevitas",
    "missing_peers",
    "modelopt",
    "nncf_onnx",
    "nncf_openvino",
    "onnxruntime_static",
    "torchao_pt2e",
]

NARROW = TARGETS[this_machine()].weight_bits < 8
"""Whether peers that can are asked for seven bits: processors without VNNI add products of eight bits in 16, which
saturates. Of the others nobody can ask it."""


def onnxruntime_static(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """ONNX Runtime's own static quantization: unsigned activations, signed weights with a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: x.numpy()} for x in self.batches), None)

    exported, prepared, path = (folder / f"{name}.onnx" for name in ("float", "prepared", "onnxruntime_static"))
    with quiet():
        export(model, calibration[0], exported)
        quant_pre_process(exported, prepared)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=NARROW,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return onnx_peer(path, threads)


def nncf_openvino(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """NNCF on an OpenVINO model, in OpenVINO."""
    path = folder / "nncf_openvino.xml"
    with quiet():
        import nncf
        import openvino

        shape = [-1, *calibration[0].shape[1:]]
        converted = openvino.convert_model(copy.deepcopy(model), example_input=calibration[0], input=[shape])
        batches = nncf.Dataset([x.numpy() for x in calibration])
        quantized = nncf.quantize(converted, batches, subset_size=len(calibration))
        openvino.save_model(quantized, path)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # else two processes side by side may share a core, and leave the other idle
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return Peer(lambda x: torch.from_numpy(compiled(x.numpy())[0]), path, "OpenVINO")


def torchao_pt2e(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """torchao's PT2E quantization for x86, compiled by Inductor, anew for each batch size that it meets, at most eight.

    Raises:
        ValueError: torch has another number of threads."""
    if torch.get_num_threads() != threads:
        raise ValueError(f"Inductor uses torch's {torch.get_num_threads()} threads: torch.set_num_threads({threads})")
    with quiet(), torch.no_grad():
        from torch._inductor import config
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(copy.deepcopy(model), (calibration[0],), dynamic_shapes=batch)
        settings = x86.get_default_x86_inductor_quantization_config(reduce_range=NARROW)
        observed = prepare_pt2e(program.module(), x86.X86InductorQuantizer().set_global(settings))
        for x in calibration:
            observed(x)
        # With `fullgraph` it raises beyond Dynamo's limit of compilations, instead of running uncompiled, in float.
        compiled = torch.compile(convert_pt2e(observed), dynamic=False, fullgraph=True)
    met: set[torch.Size] = set()

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            if x.shape not in met:  # it is compiled now, and only frozen weights become integers
                with quiet(), config.patch(freezing=True):
                    compiled(x)
                met.add(x.shape)
            logits: Tensor = compiled(x)
            return logits

    return Peer(predict, None, "Inductor")


def nncf_onnx(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """NNCF on the torch model, as torch exports it to ONNX, in ONNX Runtime."""
    path = folder / "nncf_onnx.onnx"
    with quiet(), torch.no_grad():
        os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it is compiled now, which may take minutes
        import nncf

        batches = nncf.Dataset(calibration)
        quantized = nncf.quantize(copy.deepcopy(model), batches, subset_size=len(calibration))
        # torch's quantizers for NNCF's own, which become OpenVINO's FakeQuantize, unknown to ONNX Runtime
        export_traced(nncf.strip(quantized, example_input=calibration[0]), calibration[0], path)
    return onnx_peer(path, threads)


def modelopt(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """NVIDIA's Model Optimizer, as torch exports it to ONNX (weights in float), in ONNX Runtime."""
    with quiet(), torch.no_grad():
        import modelopt.torch.quantization as mtq

        def calibrate(network: nn.Module) -> None:
            for x in calibration:
                network(x)

        path = folder / "modelopt.onnx"
        quantized = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, calibrate)
        export_traced(quantized, calibration[0], path)
    return onnx_peer(path, threads)


def brevitas(model: nn.Module, calibration: list[Tensor], folder: Path, *, threads: int = 1) -> Peer:
    """Brevitas' post-training flow on a traced graph, bias correction included, exported as QCDQ, in ONNX Runtime."""
    path = folder / "brevitas.onnx"
    with quiet(), torch.no_grad():
        from brevitas.export import export_onnx_qcdq
        from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
        from brevitas.graph.quantize import COMPUTE_LAYER_MAP, preprocess_for_quantize, quantize
        from brevitas.quant import Int8WeightPerChannelFloat

        layers = dict(COMPUTE_LAYER_MAP)
        for kind in (nn.Conv2d, nn.Linear):  # a scale for each channel, as all the other peers have; its default: one
            layer, options = COMPUTE_LAYER_MAP[kind]
            layers[kind] = (layer, {**options, "weight_quant": Int8WeightPerChannelFloat})
        # By default it would make ReLU of ReLU6, and another function of MobileNetV2.
        prepared = preprocess_for_quantize(copy.deepcopy(model), relu6_to_relu=False)
        quantized = quantize(prepared, compute_layer_map=layers)
        for mode in (calibration_mode, bias_correction_mode):
            with mode(quantized):
                for x in calibration:
                    quantized(x)
        export_traced(quantized, calibration[0], path, export_onnx_qcdq)
    return onnx_peer(path, threads)


@dataclass(frozen=True)
class Maker:
    """How a peer is made.

    Attributes:
        make: one of the functions above.
        modules: what has to be installed."""

    make: Callable[..., Peer]
    modules: tuple[str, ...]


PEERS: Mapping[str, Maker] = {
    "ONNX Runtime": Maker(onnxruntime_static, ("onnxruntime",)),
    "NNCF, OpenVINO": Maker(nncf_openvino, ("nncf", "openvino")),
    "torchao PT2E": Maker(torchao_pt2e, ("torchao",)),
    "NNCF, ONNX": Maker(nncf_onnx, ("nncf", "torchao")),  # its strip() imports torchao
    "Model Optimizer": Maker(modelopt, ("modelopt",)),
    "Brevitas": Maker(brevitas, ("brevitas", "onnxoptimizer")),
}


def missing_peers() -> set[str]:
    """Modules that are not installed."""
    return {module for peer in PEERS.values() for module in peer.modules if find_spec(module) is None}
