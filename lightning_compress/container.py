"""The file under an artifact: safetensors, with a manifest in its metadata and a checksum of every byte.

Tensors whose values repeat or are zero are stored entropy-coded, together in one tensor of bytes, where that is
smaller; reading gives them back as they were, to the bit. The manifest is JSON, compressed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from lightning_compress.files import open_atomic
from lightning_compress.methods.coding import CodingError, decode, encode, worth_trying
from lightning_compress.waiting import following

__all__ = ["ArtifactError", "container_bytes", "read_container", "storable", "write_container"]

FORMAT = 2
_KEY = "lightning_compress"
_CODED = "lightning_compress.coded"  # the tensor of bytes
ENTRY = 100
"""Bytes, roughly, that a coded tensor takes in the manifest: what coding has to save at least."""
_CHECKSUM = re.compile(rb'"checksum":"sha256:([0-9a-f]{64}) of ([0-9]{20}) bytes"')
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ArtifactError(ValueError):
    """A network that cannot be written as an artifact, or a file that cannot be loaded into a network."""


def storable(tensor: Tensor) -> bool:
    """Whether the format can hold a tensor like this one."""
    return tensor.layout is torch.strided and tensor.dtype in _TYPES


def container_bytes(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], coded: bool = True) -> int:
    """The size in bytes of the file that `write_container` would write.

    Tensors without values, and with `coded=False` all, count as they are.

    Example:
        >>> container_bytes({"a": torch.rand(1000)}, {}) > 4000 > container_bytes({"a": torch.zeros(1000)}, {})
        True
    """
    return _header(*(_coded(tensors, manifest) if coded else (tensors, manifest)))[1]


def write_container(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write tensors and a manifest; the file appears whole or not at all, and the same contents make the same bytes.

    Args:
        path: the file, in a folder that exists.
        tensors: name -> tensor, each of them `storable`.
        manifest: JSON data.

    Raises:
        ArtifactError: the folder is missing, a tensor has no values, or JSON cannot hold the manifest.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_container(Path(folder, "a"), {"x": torch.ones(2)}, {"about": "ones"})
        ...     read_container(Path(folder, "a"))
        ({'about': 'ones'}, {'x': tensor([1., 1.])})
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ArtifactError(f"cannot save tensor {name!r}: it is on the meta device and has no values")
    tensors, manifest = _coded(tensors, manifest)
    header, _ = _header(tensors, manifest)
    match = cast("re.Match[bytes]", _CHECKSUM.search(header))
    try:
        with open_atomic(path) as file:
            digest = hashlib.sha256(header)
            file.write(header)
            for content in _contents(tensors):
                digest.update(content)
                file.write(content)
            file.seek(match.start(1))
            file.write(digest.hexdigest().encode())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ArtifactError(str(error)) from error


def read_container(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_container` wrote, after checking every byte of it.

    Args:
        path: the file.

    Returns:
        The manifest, and the tensors on the CPU.

    Raises:
        ArtifactError: no such file, one that is damaged or truncated, of another kind, or of another format version.
    """
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except IsADirectoryError as error:
        raise ArtifactError(f"{name!r} is a folder: name the file in it, e.g. compressed.safetensors") from error
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {name!r}") from error
    if len(data) > 8 and data[8:9] != b"{":
        raise ArtifactError(
            f"{name!r} is no safetensors file: expected one that save_compressed or CompressionReport wrote; "
            "Lightning's checkpoints are read by load_from_checkpoint"
        )
    length = int.from_bytes(data[:8], "little")
    if len(data) < 9 or length > len(data) - 8:
        raise ArtifactError(f"{name!r} is damaged or truncated: it ends within its header, after {len(data)} bytes")
    match = _CHECKSUM.search(data, 8, 8 + length)
    if match is None:
        raise ArtifactError(f"{name!r} was not written by save_compressed, or its header is damaged")
    if len(data) != int(match[2]):
        raise ArtifactError(f"{name!r} is damaged or truncated: expected {int(match[2])} bytes, got {len(data)}")
    view = memoryview(data)
    digest = hashlib.sha256(view[: match.start(1)])
    digest.update(b"0" * 64)
    digest.update(view[match.end(1) :])
    if digest.hexdigest().encode() != match[1]:
        raise ArtifactError(f"{name!r} is damaged: its contents do not match its checksum; copy or download it again")
    # From here on the file is what write_container wrote, in this version or another.
    text = json.loads(view[8 : 8 + length].tobytes())["__metadata__"][_KEY]
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise ArtifactError(
            f"{name!r} has format {found['format']}, this version of lightning_compress reads {FORMAT}; "
            "load it with the version that wrote it"
        )
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise ArtifactError(f"{name!r} cannot be read by safetensors: {error}") from error
    manifest: dict[str, Any] = json.loads(zlib.decompress(base64.b85decode(found["manifest"])))
    return manifest, _decoded(name, tensors, manifest.pop(_CODED, {}))


def _coded(
    tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Tensors and manifest with what is smaller so entropy-coded, all of it in one tensor."""
    if _CODED in tensors:
        raise ArtifactError(f"cannot save a tensor of the name {_CODED!r}: it is that of the coded ones")
    codes: dict[str, bytes] = {}
    for name, tensor in following(tensors.items(), "coding tensors"):
        if worth_trying(tensor):
            code = encode(tensor)
            if len(code) + ENTRY < tensor.numel() * tensor.dtype.itemsize:
                codes[name] = code
    if not codes:
        return tensors, manifest
    entries = {
        name: [_TYPES[tensors[name].dtype], list(tensors[name].shape), len(code)] for name, code in codes.items()
    }
    blob = torch.frombuffer(bytearray(b"".join(codes.values())), dtype=torch.uint8)
    rest = {name: tensor for name, tensor in tensors.items() if name not in codes}
    digest = _digest(tensors[name] for name in codes)
    return {**rest, _CODED: blob}, {**manifest, _CODED: {"tensors": entries, "digest": digest}}


def _decoded(file: str, tensors: dict[str, Tensor], coded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `_coded`, checked against a digest of the tensors themselves."""
    if not coded:
        return tensors
    dtypes = {name: dtype for dtype, name in _TYPES.items()}
    blob, start, found = tensors.pop(_CODED).numpy().tobytes(), 0, {}
    try:
        for name, (kind, shape, length) in following(coded["tensors"].items(), "decoding tensors"):
            found[name] = decode(blob[start : start + length], dtypes[kind], shape)
            start += length
    except CodingError as error:
        raise ArtifactError(f"{file!r} cannot be decoded: {error}") from error
    if _digest(found.values()) != coded["digest"]:
        raise ArtifactError(f"{file!r} was decoded into other tensors than were coded: it was written or read wrongly")
    return {**tensors, **found}


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> tuple[bytes, int]:
    """The header, with zeros where the checksum goes, and the size of the whole file."""
    try:
        plain = json.dumps(manifest, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"metadata must be what JSON can hold: {error}") from error
    packed = base64.b85encode(zlib.compress(plain, 9)).decode()
    text = json.dumps({"format": FORMAT, "manifest": packed}, separators=(",", ":"))
    metadata = {"checksum": _checksum(0), "format": "pt", _KEY: text}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in _ordered(tensors):
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(_dump(entries))
    length += -length % 8
    size = 8 + length + end
    metadata["checksum"] = _checksum(size)
    return length.to_bytes(8, "little") + _dump(entries).ljust(length), size


def _checksum(size: int) -> str:
    return f"sha256:{'0' * 64} of {size:020d} bytes"


def _dump(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, separators=(",", ":")).encode()


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # so that all are aligned


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    return (_bytes(tensor) for _, tensor in _ordered(tensors))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
