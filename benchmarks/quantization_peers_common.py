"""What the peers of the int8 benchmark have in common: their result, torch's exporters, and ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from lightning_compress.runtimes import OnnxNetwork

__all__ = ["INPUT", "Peer", "export", "export_traced", "onnx_peer", "quiet"]

INPUT, OUTPUT = "images", "logits"  # of every ONNX file
OPSET = 17  # of those by torch's older exporter, which knows none after 20


@dataclass(frozen=True)
class Peer:
    """A network as a peer quantized it.

    Attributes:
        predict: logits of a batch of images, of any size unless the peer's function says otherwise.
        path: what one would deploy, with OpenVINO the `.xml` file that lies beside its `.bin`; None: there is no file.
        runtime: what computes it.
    """

    predict: Callable[[Tensor], Tensor]
    path: Path | None
    runtime: str

    @property
    def bytes(self) -> int | None:
        """Size of all the files that one would deploy."""
        if self.path is None:
            return None
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files)


def onnx_peer(path: Path, threads: int) -> Peer:
    """An ONNX file, run by ONNX Runtime."""
    return Peer(OnnxNetwork(path, threads), path, "ONNX Runtime")


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """A float network as ONNX, for batches of any size."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # else strides are part of the graph
    pair = x[:2].contiguous()  # with one sample the batch would be a constant
    batch = ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    program = torch.onnx.export(model, (pair,), dynamo=True, dynamic_shapes=batch, verbose=False, **names)
    assert program is not None
    exported = program.model_proto
    for part in (exported.graph, *exported.graph.node, *exported.graph.value_info):
        del part.metadata_props[:]  # stack traces; they would be a seventh of a quantized ResNet-20
    onnx.save(exported, path)


def export_traced(model: nn.Module, x: Tensor, path: Path, by: Callable[..., Any] = torch.onnx.export) -> None:
    """A quantized network as ONNX, by torch's older exporter: the newer one takes none of those that come here."""
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    batch = {name: {0: "batch"} for name in (INPUT, OUTPUT)}
    by(model.eval(), (x,), str(path), dynamo=False, opset_version=OPSET, dynamic_axes=batch, **names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, progress bars and running commentary."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
