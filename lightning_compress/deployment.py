"""Networks as they are deployed: exported to ONNX, counted and timed in ONNX Runtime, dense and compressed in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, resize_batch
from lightning_compress.exporting import export
from lightning_compress.latency import Latency, compare_latency
from lightning_compress.runtimes import OnnxNetwork, count_integers

__all__ = ["Deployed", "RuntimeNetwork", "compare_deployed", "deploy", "missing_packages"]

RUNTIME = "ONNX Runtime"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Deployed:
    """A network as an ONNX file in ONNX Runtime.

    Attributes:
        file: its name.
        bytes: its size.
        layers: convolutions and linear layers in the graph that the runtime makes of it.
        integer_layers: how many of them it computes with integers.
        islands: operation -> how often it is carried out on floats, of those that could be on integers.
        relative: root mean square of what its outputs differ by, relative to them.
        metric: the metric that was asked for, in the runtime; None where it was not taken.
        latency: batch size -> times, of one thread.
    """

    file: str
    bytes: int
    layers: int
    integer_layers: int
    islands: Mapping[str, int]
    relative: float
    metric: float | None = None
    latency: Mapping[int, Latency] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**asdict(self), "latency": {str(size): times.to_json() for size, times in self.latency.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Deployed:
        """The inverse of `to_json`."""
        latency = {int(size): Latency.from_json(times) for size, times in data["latency"].items()}
        return cls(**{**data, "latency": latency})


class RuntimeNetwork(nn.Module):
    """A file in ONNX Runtime that is called as the network is.

    Args:
        path: the file.
        threads: of the runtime, within an operation.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        self.path, self.threads = path, threads
        self._network = OnnxNetwork(path, threads)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What the network gives."""
        outputs = self._network(*(tensor.detach().cpu() for tensor in (*inputs, *named.values())))
        like = (*inputs, *named.values())[0].device
        return outputs.to(like) if isinstance(outputs, Tensor) else tuple(output.to(like) for output in outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeNetwork:
        return self  # a session holds nothing that a copy could change


def deploy(network: nn.Module, path: Path, call: Call) -> Deployed:
    """Export a network and count what the runtime makes of it.

    Raises:
        ExportError: it cannot be exported, or the file computes something else.
    """
    parity = export(network, path, call)
    found = count_integers(path)
    return Deployed(path.name, path.stat().st_size, found.of, found.layers, found.islands, parity.relative)


def compare_deployed(
    sides: Mapping[str, tuple[Deployed, Path]], calls: Sequence[Call], batch_sizes: Sequence[int]
) -> dict[str, Deployed]:
    """Time files against each other, with one thread.

    Args:
        sides: name -> what `deploy` gave, and the file.
        calls: how the network is called.
        batch_sizes: samples in a batch.
    """
    networks = {name: (RuntimeNetwork(path), resize_batch(calls, 1)) for name, (_, path) in sides.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = compare_latency(networks, batch_sizes)
    finally:
        torch.set_num_threads(threads)
    by_runtime = {
        name: {size: replace(latency, runtime=RUNTIME) for size, latency in own.items()} for name, own in times.items()
    }
    return {name: replace(deployed, latency=by_runtime[name]) for name, (deployed, _) in sides.items()}


def missing_packages() -> list[str]:
    """Those of the extra `export` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]
