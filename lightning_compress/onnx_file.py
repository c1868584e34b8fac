"""ONNX files: made of a traced network, and rid of what nobody needs."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_compress.deploy import SEPARATOR

__all__ = ["OnnxError", "pack", "slim", "write_onnx"]

OPSET, OPSET_INT4 = 18, 21

PLACE = re.compile(r"_(?:conv1d|conv2d|linear)_\d+(_[a-z]+)$")

BESIDE = re.compile(r"_(?:step|zero|scale|bias|unit|\d+)$")
"""Names of what is beside a weight, and of constants that torch has named; `conv1.bias` is none."""

LARGEST = 2**31 - 2**20
"""Bytes of a file in one piece; a larger network's weights go to a second file."""


class OnnxError(ValueError):
    """A network that ONNX cannot express; the message says which operation, and where."""


def write_onnx(program: torch.export.ExportedProgram, path: Path, packed: Collection[str] = ()) -> None:
    """Translate a traced network and write it.

    Args:
        program: the network; in it, it is called `network`, and what is written for it is in `constants`.
        path: the file.
        packed: names of weights to store in 4 bits.

    Raises:
        OnnxError: an operation that ONNX does not have.
        ImportError: a package is missing.
    """
    try:
        import onnxscript  # noqa: F401  (what torch translates with)
    except ImportError as error:
        raise ImportError(f"{error}; install lightning-compress[export]") from error
    opset = OPSET_INT4 if packed else OPSET
    try:
        with _quiet():
            translated = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise OnnxError(_reason(program, error)) from error
    assert translated is not None
    model = translated.model_proto
    if model.ByteSize() >= LARGEST:
        translated.save(path, external_data=True)
        return
    slim(model)
    pack(model, packed)
    path.write_bytes(model.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's running commentary."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Which operation, in which module."""
    links: list[BaseException] = [error]
    while links[-1].__cause__ is not None:
        links.append(links[-1].__cause__)
    found = next((match for link in links if (match := re.search(r"translating node %(\w+)", str(link)))), None)
    graphs = [program.graph, program.run_decompositions().graph] if found is not None else []
    node = next((n for graph in graphs for n in graph.nodes if found is not None and n.name == found[1]), None)
    last = str(links[-1]).splitlines()[0]
    if node is None:
        return f"cannot be exported to ONNX: {last}"
    stack = list(node.meta.get("nn_module_stack", {}).values())
    where = str(stack[-1][0]).removeprefix("L['self'].").removeprefix("network").lstrip(".") if stack else ""
    return f"cannot be exported to ONNX: {node.target} in {where or 'the network itself'}: {last}"


def slim(model: Any) -> None:
    """Leave out of an ONNX file what nobody needs: where things come from, types in between, attributes as usual.

    Of a small network this is more than a tenth of the file. Weights keep the names that the network gives them,
    and the steps beside them, each of which is named at every use, get short ones.

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
            short = constant.name.removeprefix("network.").removeprefix("constants.").replace(SEPARATOR, ".")
            short = PLACE.sub(r"\1", short).removesuffix("_integers")
            if BESIDE.search(short) or short in names.values():
                short = f"c{len(names)}"
            names[constant.name] = constant.name = short
    for number, node in enumerate(graph.node):
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for other, output in enumerate(node.output):
            if output and output not in outside:
                names[output] = f"v{number}" + (f".{other}" if other else "")
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in [own for own in node.attribute if _usual(own)]:
            node.attribute.remove(attribute)


def _usual(attribute: Any) -> bool:
    """Whether an attribute says what holds without it."""
    if attribute.name in ("dilations", "strides"):
        return all(value == 1 for value in attribute.ints)
    if attribute.name == "pads":
        return not any(attribute.ints)
    if attribute.name == "auto_pad":
        return bool(attribute.s == b"NOTSET")
    return bool(attribute.name == "group" and attribute.i == 1)


def pack(model: Any, names: Collection[str]) -> None:
    """Store weights in 4 bits, two in a byte, the first in the lower half.

    Args:
        model: an `onnx.ModelProto`, which is changed; its integer weights are of 8 bits.
        names: of weights whose integers are from -8 to 7.
    """
    if not names:
        return
    import numpy as np
    import onnx

    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in names]
    chosen = {name for node in nodes for name in (node.input[0], *node.input[2:3])}  # zero points are of the same type
    for constant in model.graph.initializer:
        if constant.name not in chosen or constant.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(constant).ravel()
        even = np.zeros(len(values) + len(values) % 2, np.int8)
        even[: len(values)] = values
        constant.data_type = onnx.TensorProto.INT4
        constant.raw_data = ((even[0::2] & 15) | ((even[1::2] & 15) << 4)).astype(np.uint8).tobytes()
