"""Export: a network as ONNX or as `.pt2`, checked against the network itself on real inputs.

A quantized network becomes ONNX in the form that runtimes fuse (see `deploy`). Any other network is exported as torch
does it.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.calls import Call, as_calls, batch_size, resize_batch
from lightning_compress.deploy import Emitting, link
from lightning_compress.edits import Quantize, history, skeleton
from lightning_compress.files import open_atomic
from lightning_compress.methods.quantization import settle
from lightning_compress.quantized import using
from lightning_compress.quiet import evaluating, without_observers

__all__ = ["OPSET", "ExportError", "Parity", "export"]

OPSET = 18
Format = Literal["onnx", "pt2"]

PLACE = re.compile(r"_(?:conv1d|conv2d|linear)_\d+(_[a-z]+)$")

LARGEST = 2**31 - 2**20
"""Bytes of a file in one piece; a larger network's weights go to a second file."""

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
    """

    difference: float
    relative: float
    agreement: float | None
    samples: int


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Tensor | Call | Sequence[Any],
    format: Format = "onnx",
) -> Parity | None:
    """Write a network as a file for other runtimes, and check what the file computes.

    ONNX is of opset 18, with any batch size; quantized weights are stored as 8-bit integers, those of fewer bits too,
    for runtimes compute with 8. `.pt2` is `torch.export`'s format, for ExecuTorch, AOTInductor and others.

    Args:
        model: the network; it is not changed.
        path: the file to write.
        inputs: real inputs, as the network gets them: a tensor, a tuple of arguments or a call; with at least two
            samples, some dozens for the check to mean something.
        format: `onnx` or `pt2`.

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
    if format not in get_args(Format):
        raise ValueError(f"`format` must be one of {', '.join(get_args(Format))}, got {format!r}")
    calls = as_calls(inputs)
    if len(calls) != 1 or calls[0].path:
        raise ExportError("a network is exported as it is called once: give one call of the network itself")
    call = calls[0].map(lambda tensor: tensor.detach().cpu())
    if batch_size([call]) < 2:
        call = resize_batch([call], 2)[0]
    inner = getattr(model, "_orig_mod", model)
    with without_observers(inner):
        network = skeleton(inner, _plain)
    network.eval().requires_grad_(requires_grad=False)
    with evaluating(network):
        wanted = network(*call.args, **call.kwargs)
    path = Path(path)
    if format == "pt2":
        program = _traced(network, call, None)
        torch.export.save(program, path)
        return _compare(wanted, torch.export.load(path).module()(*call.args, **call.kwargs), quantized=False)
    quantized = any(isinstance(edit, Quantize) for edit in history(network))
    emitting = None
    if quantized:
        settle(network)
        emitting = Emitting(link(network, lambda linking: _run(network, call, linking)))
    program = _traced(network, call, emitting)
    _write_onnx(program, path)
    return check_onnx(path, call, wanted, quantized)


def _plain(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu().clone()
    return copy.float() if copy.is_floating_point() else copy


def check_onnx(path: Path, call: Call, wanted: Any, quantized: bool) -> Parity:
    """Run a file in ONNX Runtime and compare.

    Raises:
        ExportError: it cannot be run, or computes something else.
    """
    from lightning_compress.runtimes import OnnxNetwork

    return _compare(wanted, OnnxNetwork(path)(*call.tensors()), quantized)


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
            return torch.export.export(
                _Positional(network, call), tuple(tensors), strict=False, dynamic_shapes=(tuple(shapes),)
            )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"cannot be exported: {error}") from error


class _Positional(nn.Module):
    """A network whose tensors come in one row, as ONNX has them."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *tensors: Tensor) -> Any:
        leaves, spec = pytree.tree_flatten((self._call.args, dict(self._call.kwargs)))
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return self.network(*args, **kwargs)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"cannot be exported to ONNX: {error}") from error
    assert onnx_program is not None
    model = onnx_program.model_proto
    if model.ByteSize() < LARGEST:
        slim(model)
        with open_atomic(path) as file:
            file.write(model.SerializeToString())
    else:
        onnx_program.save(path, external_data=True)


def slim(model: Any) -> None:
    """Leave out of an ONNX file what nobody needs: where things come from, types in between, attributes as usual.

    Of a small network this is more than a tenth of the file. Weights keep the names that the network gives them.

    Args:
        model: an `onnx.ModelProto`, which is changed.
    """
    graph = model.graph
    del graph.value_info[:]
    del graph.metadata_props[:]
    outside = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    for constant in graph.initializer:
        del constant.metadata_props[:]
        constant.ClearField("doc_string")
        if constant.name not in outside:
            short = PLACE.sub(r"\1", constant.name.removeprefix("network.")).removesuffix("_integers")
            names[constant.name] = short if short not in names.values() else constant.name
            constant.name = names[constant.name]
    for number, node in enumerate(graph.node):
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for other, output in enumerate(node.output):
            if output and output not in outside:
                names[output] = f"v{number}" + (f".{other}" if other else "")
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        usual = [own for own in node.attribute if _usual(own)]
        for own in usual:
            node.attribute.remove(own)


def _usual(attribute: Any) -> bool:
    """Whether an attribute says what holds without it."""
    if attribute.name in ("dilations", "strides"):
        return all(value == 1 for value in attribute.ints)
    if attribute.name == "pads":
        return not any(attribute.ints)
    if attribute.name == "auto_pad":
        return bool(attribute.s == b"NOTSET")
    return bool(attribute.name == "group" and attribute.i == 1)


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
