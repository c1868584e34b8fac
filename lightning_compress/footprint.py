"""What a network costs: parameters, multiply-accumulates, bytes on disk, memory, each from the network itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_compress.artifact import artifact_bytes
from lightning_compress.calls import Call, as_calls, explain_inputs, resize_batch, run_calls
from lightning_compress.edits import named_tensors
from lightning_compress.latency import BATCH_SIZES, Latency, compare_latency
from lightning_compress.meter import Meter
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["Footprint", "measure", "place"]


@dataclass(frozen=True)
class Footprint:
    """What a network costs.

    Attributes:
        params: parameters; tied ones count once.
        nonzero: how many of them are not zero; None on a skeleton, which has no values.
        macs: multiply-accumulates of one sample, summed over all recorded calls.
        bytes: size of the file that `save_compressed` writes.
        peak_memory: bytes held at the worst moment for one sample: parameters, buffers, inputs, activations.
        layers: module path -> multiply-accumulates of the operations that ran in that module itself.
        uncounted: operation -> output elements, for operations that compute but are not in `macs`.
        latency: batch size -> times, in milliseconds; empty unless asked for.

    Example:
        >>> footprint = measure(nn.Linear(4, 3), torch.zeros(1, 4))
        >>> footprint.params, footprint.macs, footprint.sparsity
        (15, 12, 0.0)
    """

    params: int
    nonzero: int | None
    macs: int
    bytes: int
    peak_memory: int
    layers: Mapping[str, int] = field(default_factory=dict)
    uncounted: Mapping[str, int] = field(default_factory=dict)
    latency: Mapping[int, Latency] = field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """The fraction of parameters that are zero but stored; None on a skeleton."""
        return None if self.nonzero is None or not self.params else 1 - self.nonzero / self.params

    def to_json(self) -> dict[str, Any]:
        """The footprint as JSON data."""
        data = asdict(self)
        data["latency"] = {str(size): latency.to_json() for size, latency in self.latency.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Footprint:
        """The inverse of `to_json`."""
        latency = {int(size): Latency.from_json(value) for size, value in data["latency"].items()}
        return cls(**{**data, "latency": latency})


@explain_inputs
def measure(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    *,
    latency: bool = False,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Footprint:
    """Measure a network by running it, at batch size 1, on recorded or given inputs.

    Multiply-accumulates are those of the operations that really run (`torch.utils.flop_counter`, halved), so layers
    called twice, tied weights and functional calls are counted as they happen; zeros in a weight save nothing. Complex
    products count as the real ones they are made of, Fourier transforms as FFTs (see `meter.py`).
    Biases, norms, activations and pooling are not in the number: `uncounted` says what is left out, and how much.

    Peak memory is computed on a CPU from the storages that are alive after each operation (scratch memory within an
    operation is not seen); on a GPU it is what torch's allocator held beyond what it held before, plus the model.

    Training mode, buffers and random state are left as they were. Skeletons (fake or meta tensors) are measured too,
    without memory or arithmetic.

    Args:
        model: any network, on any device.
        inputs: recorded calls, or one tensor or a tuple of positional arguments, batch first; any batch size.
        latency: time it as well, see `compare_latency`.
        batch_sizes: the batch sizes to time.

    Returns:
        The footprint.

    Example:
        >>> footprint = measure(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10))
        >>> footprint.params, footprint.macs == 10 * 10 * 8 * 3 * 9, footprint.uncounted
        (224, True, {})
    """
    fake_mode = next((t.fake_mode for _, t in named_tensors(model) if isinstance(t, FakeTensor)), None)
    with fake_mode or nullcontext(), without_observers(model), undisturbed(model):
        calls = resize_batch(place(as_calls(inputs), model), 1)
        meter = Meter(model, calls)
        with meter.count():
            run_calls(model, calls)
        peak = meter.peak_memory
        if any(tensor.is_cuda for tensor in model.parameters()) and fake_mode is None:
            peak = _cuda_peak(model, calls)
        footprint = Footprint(
            params=sum(parameter.numel() for parameter in model.parameters()),
            nonzero=_nonzero(model),
            macs=meter.counter.get_total_flops() // 2,
            bytes=artifact_bytes(model),
            peak_memory=peak,
            layers=dict(meter.layers),
            uncounted=dict(meter.uncounted.most_common()),
        )
    if not latency:
        return footprint
    times = compare_latency({"": (model, as_calls(inputs))}, batch_sizes)[""]
    return Footprint(**{**footprint.__dict__, "latency": times})


def place(calls: Sequence[Call], model: nn.Module) -> tuple[Call, ...]:
    """The calls with their tensors where the parameters of `model` are: on the same device, and fake if those are."""
    reference = next((tensor for _, tensor in named_tensors(model)), None)
    if reference is None:
        return tuple(calls)

    def move(tensor: Tensor) -> Tensor:
        if isinstance(reference, FakeTensor) and not isinstance(tensor, FakeTensor):
            tensor = reference.fake_mode.from_tensor(tensor)
        return tensor.to(reference.device)

    return tuple(call.map(move) for call in calls)


def _nonzero(model: nn.Module) -> int | None:
    parameters = list(model.parameters())
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in parameters):
        return None
    return sum(int(torch.count_nonzero(parameter)) for parameter in parameters)


def _cuda_peak(model: nn.Module, calls: Sequence[Call]) -> int:
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in named_tensors(model)}
    own |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for call in calls for t in call.tensors()}
    device = next(parameter.device for parameter in model.parameters() if parameter.is_cuda)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_calls(model, calls)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + sum(own.values())
