"""What became of each layer: from the rows of `results.json`, and from the artifact's header where it says more."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_compress.app.dashboard.reading import DamagedFileError, items, section, text

__all__ = ["Layer", "Manifest", "layer_table", "read_manifest"]

Layer = dict[str, Any]
"""`layer`, `before` (its shape), `after` (shapes; several where it became a chain), `macs` [before, after], `notes`,
and `stored`: bytes in the artifact."""

Manifest = dict[str, Any]
"""What an artifact says about itself, `tensors` (name -> bytes in the file) and `codebooks` (name -> entries) added."""

_KEY = "lightning_compress"
_CODED = "lightning_compress.coded"
_FORMAT = 2
_CODE = struct.Struct("<BBQI")  # how a coded tensor begins: version, flags, nonzero elements, entries of the codebook
_HAS_BOOK = 4 | 8  # flags: one codebook, or one for each row
_LONGEST_HEADER = 1 << 27


def read_manifest(path: Path) -> Manifest:
    """Read the header of an artifact, and no tensor of it.

    `lightning_compress.artifact.read_metadata` checks every byte and needs torch; a page of many runs wants to know
    neither the weights nor whether they are whole.

    Raises:
        DamagedFileError: no such file, or none that `save_compressed` of this version wrote.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LONGEST_HEADER, path.stat().st_size):
                raise DamagedFileError(f"{path.name} is no safetensors file, or it is truncated")
            header = json.loads(file.read(length))
            found = json.loads(header.pop("__metadata__")[_KEY])
            if found["format"] != _FORMAT:
                raise DamagedFileError(f"{path.name}: expected format {_FORMAT}, got {found['format']!r}")
            manifest: Manifest = json.loads(zlib.decompress(base64.b85decode(found["manifest"])))
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            coded = manifest.pop(_CODED, {"tensors": {}})["tensors"]
            start = 8 + length + spans.pop(_CODED, [0, 0])[0]
            manifest["tensors"] = {name: end - begin for name, (begin, end) in spans.items()}
            manifest["codebooks"] = {}
            for name, (_, shape, size) in coded.items():
                file.seek(start)
                _, flags, nonzero, entries = _CODE.unpack(file.read(_CODE.size))
                start += size
                manifest["tensors"][name] = size
                manifest["codebooks"][name] = (entries if flags & _HAS_BOOK else 0, nonzero / max(1, math.prod(shape)))
    except OSError as error:
        raise DamagedFileError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, zlib.error) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path.name} is no artifact of this version, or it is damaged: {error!r}") from error
    return manifest


def layer_table(results: dict[str, Any], manifest: Manifest | None) -> list[Layer]:
    """One row for each layer that changed, in the order of the network.

    Args:
        results: what `results.json` holds.
        manifest: what the artifact says; None if there is none.

    Raises:
        DamagedFileError: `layers` is not what a report writes.

    Example:
        >>> rows = [
        ...     {"tensor": "fc.weight", "before": [9, 9], "after": None, "macs_before": 81, "macs_after": 0},
        ...     {"tensor": "fc.0.weight", "before": None, "after": [2, 9], "macs_before": 0, "macs_after": 18},
        ...     {"tensor": "fc.1.weight", "before": None, "after": [9, 2], "macs_before": 0, "macs_after": 18},
        ... ]
        >>> layer_table({"layers": rows}, None)[0]["after"]
        [[2, 9], [9, 2]]
    """
    table: dict[str, Layer] = {}
    try:
        if manifest is not None:
            for name, shape in manifest["architecture"].items():
                _row(table, name, shape)
        gone = {_layer(row["tensor"]) for row in items(results, "layers") if row["after"] is None}
        for row in items(results, "layers"):
            _add_shapes(table, row, gone)
        _add_costs(table, results)
        if manifest is not None:
            _add_edits(table, manifest)
            _add_storage(table, manifest)
        _add_widths(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"`layers` or the artifact's edits are damaged: {error!r}") from error
    return [row for row in table.values() if row["after"] or row["notes"]]


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _row(table: dict[str, Layer], tensor: str, shape: list[int] | None) -> Layer:
    empty: Layer = {"layer": _layer(tensor), "before": None, "after": [], "macs": None, "notes": [], "stored": 0}
    row = table.setdefault(_layer(tensor), empty)
    if shape is not None and len(shape) >= len(row["before"] or ()):  # the weight stands for its bias
        row["before"] = shape
    return row


def _add_shapes(table: dict[str, Layer], row: dict[str, Any], gone: set[str]) -> None:
    """The new shapes of a tensor, under the layer that it is, or that it came in place of."""
    name, before, after = row["tensor"], row["before"], row["after"]
    place = next(_prefixes(_layer(name), gone), None) if before is None else None
    layer = _row(table, f"{place}.{name.rpartition('.')[2]}" if place is not None else name, before)
    if after is not None and len(after) > 1:
        layer["after"].append(after)
    elif after is not None and not layer["after"] and layer["before"] is not None and len(layer["before"]) < 2:
        layer["after"].append(after)  # a norm, which has no larger tensor


def _prefixes(path: str, names: set[str]) -> Iterator[str]:
    while path:
        if path in names:
            yield path
        path = path.rpartition(".")[0]


def _add_costs(table: dict[str, Layer], results: dict[str, Any]) -> None:
    rows = items(results, "layers")
    before = {_layer(row["tensor"]): row["macs_before"] for row in rows} | section(section(results, "dense"), "layers")
    after = {_layer(row["tensor"]): row["macs_after"] for row in rows} | section(
        section(results, "compressed"), "layers"
    )
    places = set(table)
    spent: dict[str, list[float]] = {}
    for side, costs in enumerate((before, after)):
        for path, macs in costs.items():
            place = next(_prefixes(path, places), path)
            spent.setdefault(place, [0, 0])[side] += macs
    for path, row in table.items():
        row["macs"] = spent.get(path)


def _add_edits(table: dict[str, Layer], manifest: Manifest) -> None:
    """What the edits say beyond shapes: which form and rank, how many bits; a later edit of the same kind outweighs."""
    notes: dict[str, dict[str, str]] = {}
    for edit in manifest["edits"]:
        if edit["kind"] == "replace":
            for path, (_, after) in edit["layers"].items():
                place = next(_prefixes(path, set(table)), path)
                notes.setdefault(place, {})[path] = _form(after)
        elif edit["kind"] == "quantize":
            for name, (low, high) in edit["weights"].items():
                place = next(_prefixes(_layer(name), set(table)), _layer(name))
                notes.setdefault(place, {})["bits"] = f"{_bits(low, high)}-bit integers"
    for path, own in notes.items():
        _row(table, f"{path}.weight", None)["notes"] += own.values()


def _add_widths(table: dict[str, Layer]) -> None:
    for row in table.values():
        before, after = row["before"], row["after"]
        if before and len(after) == 1 and len(after[0]) == len(before):
            kept = [
                f"{new} of {old} {dim}" for old, new, dim in zip(before, after[0], _DIMS, strict=False) if new < old
            ]
            row["notes"][:0] = [f"kept {' and '.join(kept)}"] if kept else []


_DIMS = ("outputs", "inputs")  # of a weight; its other dims are never cut


def _form(spec: dict[str, Any]) -> str:
    """What came in a layer's place, in a word, with its rank."""
    chain = spec.get("layers") or [spec]
    widths = [layer.get("out_channels", layer.get("out_features")) for layer in chain[:-1]]
    name = text(spec.get("form")) or text(spec.get("type"))
    ranks = " × ".join(str(width) for width in widths if width)
    return f"{name.replace('_', ' ')}, rank {ranks}" if ranks else name.replace("_", " ")


def _bits(low: int, high: int) -> int:
    return max(1, math.ceil(math.log2(high - low + 1)))


def _add_storage(table: dict[str, Layer], manifest: Manifest) -> None:
    places = set(table)
    for name, size in manifest["tensors"].items():
        place = next(_prefixes(_layer(name), places), None)
        if place is None:
            continue
        table[place]["stored"] += size
        entries, full = manifest["codebooks"].get(name, (0, 1.0))
        if full < 0.99:  # rounding makes a few of them anywhere
            table[place]["notes"].append(f"{1 - full:.1%} zeros")
        if entries and name not in manifest["integers"]:  # of which the bits say as much
            table[place]["notes"].append(f"codebook of {entries}")
