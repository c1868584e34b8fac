"""Export: a network as ONNX or as `.pt2`, checked against the network itself on real inputs.

A quantized network becomes ONNX in the form that runtimes fuse (see `deploy`). Any other network is exported as torch
does it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.calls import Call, as_calls, batch_size, explain_inputs, resize_batch
from lightning_compress.deploy import Emitting, link
from lightning_compress.edits import Quantize, history, skeleton
from lightning_compress.methods.quantization import quantized_weights, settle
from lightning_compress.onnx_file import OnnxError, write_onnx
from lightning_compress.quantized import using
from lightning_compress.quiet import evaluating, without_observers
from lightning_compress.runtimes import OnnxNetwork
from lightning_compress.waiting import working
from lightning_compress.wording import require_choice

__all__ = ["ExportError", "Parity", "export"]

Format = Literal["onnx", "pt2"]

INT4 = 16
"""Integers that 4 bits hold."""

TOLERANCE = {False: 1e-3, True: 0.05}
"""Root mean square of the difference, relative to that of the outputs, above which a file is wrong; quantized or not.
Sums of integers are rounded where sums of floats are not, by one step here and there."""


class ExportError(ValueError):
    """A network that cannot be exported, or a file that computes something else."""


@dataclass(frozen=True)
class Parity:
    """How a file compares with the network that it was made of, on the inputs that were given.

    Attributes:
        difference: the largest difference of an output.
        relative: root mean square of the differences, relative to that of the outputs.
        agreement: fraction of samples with the same largest output; None where outputs are no scores.
        samples: how many inputs.

    Example:
        >>> parity = Parity(difference=1e-6, relative=1e-7, agreement=1.0, samples=64)  # what `export` gives
        >>> f"{parity.agreement:.0%} of {parity.samples} samples alike"
        '100% of 64 samples alike'
    """

    difference: float
    relative: float
    agreement: float | None
    samples: int


@explain_inputs
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Tensor | Call | Sequence[Any],
    format: Format = "onnx",
    int4: bool = False,
) -> Parity:
    """Write a network as a file for other runtimes, and check what the file computes.

    ONNX is of opset 18, with any batch size; quantized weights are stored as 8-bit integers, those of fewer bits too,
    for runtimes compute with 8. `.pt2` is `torch.export`'s format, for ExecuTorch, AOTInductor and others; a quantized
    network is in it as it computes in torch, with rounded floats. The file appears when its outputs were found right.

    Args:
        model: the network; it is not changed.
        path: the file to write.
        inputs: real inputs, as the network gets them: a tensor (batch first), a tuple of arguments or a call; with at
            least two samples, some dozens for the check to mean something.
        format: `onnx` or `pt2`.
        int4: store weights of 4 bits and fewer as ONNX's 4-bit integers (opset 21). The file is smaller; ONNX Runtime
            then computes with floats on a CPU, and is no faster than without quantization.

    Returns:
        How outputs compare; of ONNX in ONNX Runtime.

    Raises:
        ExportError: an operation that cannot be exported, a missing package, or outputs that differ.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     parity = export(nn.Linear(3, 2), Path(folder, "net.onnx"), torch.randn(4, 3))
        >>> parity.agreement
        1.0
    """
    require_choice("format", format, get_args(Format))
    calls = as_calls(inputs)
    if len(calls) != 1 or calls[0].path:
        raise ExportError(
            f"a network is exported as it is called once: give one call of the network itself, got {len(calls)} calls"
        )
    call = calls[0].map(lambda tensor: tensor.detach().cpu().contiguous())
    if batch_size([call]) < 2:
        call = resize_batch([call], 2)[0]
    inner = getattr(model, "_orig_mod", model)
    with without_observers(inner):
        network = skeleton(inner, _plain)
    network.eval().requires_grad_(requires_grad=False)
    with evaluating(network):
        wanted = network(*call.args, **call.kwargs)
    path, quantized = Path(path), any(isinstance(edit, Quantize) for edit in history(network))
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {os.fspath(path)!r}: there is no folder {os.fspath(path.parent)!r}")
    unchecked = path.with_name(f"{path.name}.unchecked")
    try:
        with working(f"exporting to {path}"):
            if format == "pt2":
                torch.export.save(_traced(network, call, None), unchecked)
                got = torch.export.load(unchecked).module()(*call.tensors())
            else:
                _write(network, call, unchecked, quantized, int4)
                got = OnnxNetwork(unchecked)(*call.tensors())
        parity = _compare(wanted, got, quantized and format == "onnx")
        os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    return parity


def _write(network: nn.Module, call: Call, path: Path, quantized: bool, int4: bool) -> None:
    emitting, packed = None, []
    if quantized:
        settle(network)
        emitting = Emitting(link(network, lambda linking: _run(network, call, linking)))
        packed = [name for name, *_, grid in quantized_weights(network) if int4 and grid.levels <= INT4]
    try:
        write_onnx(_traced(network, call, emitting), path, packed)
    except OnnxError as error:
        raise ExportError(str(error)) from error


def _plain(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # else strides are part of the graph
    return copy.float() if copy.is_floating_point() else copy


def _run(network: nn.Module, call: Call, calls: Any) -> Any:
    with evaluating(network), using(calls):
        return network(*call.args, **call.kwargs)


def _traced(network: nn.Module, call: Call, emitting: Emitting | None) -> torch.export.ExportedProgram:
    tensors = call.tensors()
    size = batch_size([call])
    shapes = [{0: torch.export.Dim.DYNAMIC} if tensor.dim() and len(tensor) == size else None for tensor in tensors]
    scope = contextlib.nullcontext() if emitting is None else using(emitting)
    try:
        with torch.no_grad(), scope, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            whole = _Positional(network, call, None if emitting is None else emitting.links.constants)
            return torch.export.export(whole, tuple(tensors), strict=False, dynamic_shapes=(tuple(shapes),))
    except (RuntimeError, TypeError, ValueError) as error:
        lines = str(error).splitlines()
        places = [line.strip() for line in lines if line.strip().startswith("File ")]
        where = f" ({places[-1]})" if places else ""
        raise ExportError(f"cannot be exported: {lines[0] if lines else type(error).__name__}{where}") from error


class _Positional(nn.Module):
    """A network whose tensors come in one row, as ONNX has them, and constants that are traced with it."""

    def __init__(self, network: nn.Module, call: Call, constants: nn.Module | None) -> None:
        super().__init__()
        self.network, self.constants = network, constants
        self._call = call

    def forward(self, *tensors: Tensor) -> Any:
        leaves, spec = pytree.tree_flatten((self._call.args, dict(self._call.kwargs)))
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return self.network(*args, **kwargs)


def _compare(wanted: Any, got: Any, quantized: bool) -> Parity:
    pairs = list(zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=True))
    differences = [(a.double() - b.double()).flatten() for a, b in pairs]
    difference = max(float(d.abs().max()) for d in differences)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    error = sum(float(d.square().sum()) for d in differences)
    first, second = pairs[0]
    agreement = float((first.argmax(1) == second.argmax(1)).double().mean()) if first.dim() == 2 else None
    parity = Parity(difference, (error / size) ** 0.5 if size else error**0.5, agreement, len(first))
    if not parity.relative <= TOLERANCE[quantized]:
        raise ExportError(f"the file computes something else than the network: {parity}")
    return parity
