"""A teacher's outputs in memory-mapped files, one row for each sample of the training set.

A frozen teacher gives the same output for the same input, so from the second epoch on its forward pass can be read
from the disk. That holds only while the input is the same: with each row goes a fingerprint of the input it belongs
to, and an input that does not match is an error, never a wrong target.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from lightning_compress.distill.fingerprints import WIDTH, differ, fingerprint, raw_bytes, weights_digest
from lightning_compress.files import write_atomic

__all__ = ["CacheError", "OutputCache", "weights_digest"]

FORMAT = 1
Bytes = npt.NDArray[np.uint8]
Records = npt.NDArray[Any]


class CacheError(ValueError):
    """Cached outputs cannot be used: files that do not fit, or a sample whose input is not the one of before."""


@dataclass(frozen=True)
class _Layout:
    """What the JSON file says of the other two."""

    format: int
    teacher: str
    samples: int
    shape: list[int]
    dtype: str
    inputs: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)  # _parse looked
        return dtype

    @property
    def row(self) -> int:
        """Bytes of an output."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def record(self) -> np.dtype[Any]:
        """Fingerprint of the input, and the checksum of fingerprint and output; 0: there is no output yet."""
        return np.dtype([("print", "<f4", (self.inputs, WIDTH)), ("check", "<u4")])


class OutputCache:
    """The outputs of one teacher for the samples of one data set, by index.

    In `folder/<teacher>/` lie `outputs.bin` (the rows, raw), `records.bin` (fingerprints and checksums) and
    `cache.json` (what they hold). A row counts as present only if its checksum fits, so that a run may be killed, or
    the machine lose its power, at any time: what was not wholly written is computed again. Several processes may use
    the same folder at once.

    Args:
        folder: where caches lie; made if it is not there.
        samples: length of the data set.
        teacher: what tells this teacher from others; `weights_digest` gives it. Letters, digits, '-', '_' and '.'.

    Raises:
        CacheError: the files that are there are damaged, or of another data set.
        ValueError: `samples` or `teacher` is not possible.

    Example:
        >>> import tempfile
        >>> x = torch.eye(4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = OutputCache(folder, samples=100, teacher="abc")
        ...     cache.store([7, 3], [x[:2]], torch.tensor([[0.7], [0.3]]))
        ...     cache.lookup([3], [x[1:2]]), cache.lookup([3, 4], [x[1:3]])
        (tensor([[0.3000]]), None)
    """

    def __init__(self, folder: str | Path, samples: int, teacher: str) -> None:
        if samples < 1:
            raise ValueError(f"`samples` must be at least 1, got {samples}")
        if not re.fullmatch(r"\w[\w.-]*", teacher):
            raise ValueError(f"`teacher` must be made of letters, digits, '-', '_' and '.', got {teacher!r}")
        self.folder = Path(folder) / teacher
        self.samples = samples
        self.teacher = teacher
        self._layout: _Layout | None = None
        self._rows: Bytes = np.empty((0, 0), np.uint8)
        self._records: Records = np.empty(0)
        self._open()

    def lookup(self, indices: Sequence[int], inputs: Sequence[Tensor]) -> Tensor | None:
        """The outputs of these samples, if all of them are there.

        Args:
            indices: N places in the data set.
            inputs: what the teacher would be called with, tensors [N, ...].

        Returns:
            [N, ...] on the device of the inputs, in the dtype that was stored; None if any of them is missing.

        Raises:
            CacheError: a sample's input is not the one that its cached output belongs to.
            IndexError: an index is not one of the data set.
        """
        places = self._places(indices, inputs)
        if self._layout is None and not self._open():  # another process may have made the files meanwhile
            return None
        assert self._layout is not None
        rows, records = self._rows[places], self._records[places]
        present = _present(rows, records)
        if present.any():
            self._compare(places, present, records["print"], fingerprint(inputs))
        if not present.all():
            return None
        outputs = torch.from_numpy(rows).view(self._layout.torch_dtype).view(len(places), *self._layout.shape)
        return outputs.to(inputs[0].device)

    def store(self, indices: Sequence[int], inputs: Sequence[Tensor], outputs: Tensor) -> None:
        """Keep the outputs of these samples; those that are there already stay as they are.

        Args:
            indices: N places in the data set.
            inputs: what the teacher was called with, tensors [N, ...].
            outputs: what it returned, [N, ...]. The first call decides on shape and dtype.

        Raises:
            CacheError: shape or dtype are not those of the file; a sample that is there had another input; an input
                is not finite; the disk is full.
            IndexError: an index is not one of the data set.
        """
        places = self._places(indices, inputs)
        if len(outputs) != len(places):
            raise CacheError(f"cached outputs are one for each sample: got {len(outputs)} for {len(places)} samples")
        layout = _Layout(
            FORMAT,
            self.teacher,
            self.samples,
            list(outputs.shape[1:]),
            str(outputs.dtype).removeprefix("torch."),
            len(inputs),
        )
        if self._layout is None:
            self._create(layout)
        assert self._layout is not None
        self._check(self._layout, layout)
        prints, records = fingerprint(inputs), self._records[places]
        present = _present(self._rows[places], records)
        self._compare(places, present, records["print"], prints)
        unknown = places[~np.isfinite(prints).all((1, 2))]
        if len(unknown):
            raise CacheError(
                f"sample {unknown[0]}'s input is not finite, so it cannot be told from others: outputs are cached for "
                "finite inputs only; correct the sample, or use cache=None"
            )
        rows = raw_bytes(outputs.reshape(len(places), -1))
        new = ~present
        self._write(places[new], rows[new], prints[new])

    def _write(self, places: npt.NDArray[np.int64], rows: Bytes, prints: npt.NDArray[np.float32]) -> None:
        self._rows[places] = rows
        self._records["print"][places] = prints
        self._mark(places, np.array([_checksum(*pair) for pair in zip(rows, prints, strict=True)], np.uint32))

    def _mark(self, places: npt.NDArray[np.int64], checks: npt.NDArray[np.uint32]) -> None:
        """Last, so that a row is not seen before it is whole."""
        self._records["check"][places] = checks

    def _places(self, indices: Sequence[int], inputs: Sequence[Tensor]) -> npt.NDArray[np.int64]:
        for index in indices:
            if not 0 <= index < self.samples:
                raise IndexError(f"sample {index} is not in a data set of {self.samples} samples")
        if not inputs or any(x.dim() == 0 or len(x) != len(indices) for x in inputs):
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs) or "none"
            raise CacheError(
                f"cached outputs need inputs whose first dim is the batch: {len(indices)} samples are in the batch, "
                f"the shapes are {shapes}; use cache=None"
            )
        return np.asarray(indices, np.int64)

    def _compare(
        self, places: npt.NDArray[np.int64], present: npt.NDArray[np.bool_], old: Records, new: Records
    ) -> None:
        """Raise if the input of a sample that is present has changed."""
        if old.shape != new.shape:
            raise CacheError(
                f"the teacher was called with {old.shape[1]} inputs when {self.folder} was written, now with "
                f"{new.shape[1]}; delete the folder, or use another"
            )
        wrong = places[present & differ(old, new)]
        if len(wrong):
            raise CacheError(
                f"sample {wrong[0]}'s input differs from the one that the teacher's cached output belongs to: the "
                "input is augmented randomly (or the data set changed). Cached outputs need the same input for a "
                f"sample in every epoch: train without random augmentation, or use cache=None (delete {self.folder} "
                "if the data set changed)"
            )

    def _open(self) -> bool:
        """Map the files if they are there."""
        path = self.folder / "cache.json"
        if not path.is_file():
            return False
        layout = self._parse(path)
        found = (layout.format, layout.teacher, layout.samples)
        for name, there, asked in zip(
            ("format", "teacher", "samples"), found, (FORMAT, self.teacher, self.samples), strict=True
        ):
            if there != asked:
                raise self._misfit(name, there, asked)
        rows, records = self.folder / "outputs.bin", self.folder / "records.bin"
        for file, expected in ((rows, layout.row), (records, layout.record.itemsize)):
            size = file.stat().st_size if file.is_file() else 0
            if size != expected * self.samples:
                raise CacheError(
                    f"{file} is damaged: it has {size} bytes instead of {expected * self.samples}; "
                    f"delete {self.folder} and the outputs are computed again"
                )
        self._rows = np.memmap(rows, np.uint8, "r+", shape=(self.samples, layout.row))
        self._records = np.memmap(records, layout.record, "r+", shape=(self.samples,))
        self._layout = layout
        return True

    def _parse(self, path: Path) -> _Layout:
        try:
            layout = _Layout(**json.loads(path.read_bytes()))
            valid = isinstance(layout.samples, int) and layout.torch_dtype.itemsize * layout.row > 0
            valid = valid and isinstance(layout.inputs, int) and layout.inputs > 0
        except (ValueError, TypeError, AttributeError, AssertionError):
            valid = False
        if not valid:
            raise CacheError(f"{path} is damaged; delete {self.folder} and the outputs are computed again")
        return layout

    def _create(self, layout: _Layout) -> None:
        if not layout.row:
            raise CacheError(f"the teacher's outputs are empty: shape {layout.shape}; there is nothing to cache")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "cache.lock"):
            if self._open():  # another process was first
                return
            for name, row in (("outputs.bin", layout.row), ("records.bin", layout.record.itemsize)):
                self._reserve(self.folder / name, row * self.samples)
            write_atomic(self.folder / "cache.json", json.dumps(asdict(layout), indent=2) + "\n")
            self._open()

    def _reserve(self, path: Path, size: int) -> None:
        """A file of zeros that has its place on the disk: a full disk would kill who writes to a mapped file."""
        with path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                raise CacheError(f"cannot make {path} of {size / 2**20:.0f} MiB: {error}") from error

    def _check(self, there: _Layout, asked: _Layout) -> None:
        for name in ("shape", "dtype", "inputs"):
            if getattr(there, name) != getattr(asked, name):
                raise self._misfit(name, getattr(there, name), getattr(asked, name))

    def _misfit(self, name: str, there: object, asked: object) -> CacheError:
        return CacheError(
            f"{self.folder} holds outputs of {name} {there}, expected {asked}: they are of another data set, teacher "
            "or precision. The folder can be deleted (the outputs are computed again), or use another"
        )


def _checksum(row: Bytes, numbers: npt.NDArray[np.float32]) -> int:
    """CRC-32 of a row and its fingerprint; never 0, which says that there is no row."""
    return zlib.crc32(np.ascontiguousarray(row).data, zlib.crc32(np.ascontiguousarray(numbers).data)) or 1


def _present(rows: Bytes, records: Records) -> npt.NDArray[np.bool_]:
    checks = records["check"]
    return np.array(
        [
            bool(check) and check == _checksum(row, numbers)
            for check, row, numbers in zip(checks, rows, records["print"], strict=True)
        ],
        np.bool_,
    )
