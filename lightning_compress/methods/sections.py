"""Sections of bytes, one after another: what coded tensors are made of."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CodingError", "Words", "array", "pack", "read_words", "unpack", "write_words"]

Words = NDArray[Any]


class CodingError(ValueError):
    """A tensor that cannot be coded, or data that is no coded tensor."""


def write_words(words: NDArray[np.uint32]) -> bytes:
    """What a coder gives, in one order of bytes on every machine."""
    return words.astype("<u4").tobytes()


def read_words(data: memoryview) -> NDArray[np.uint32]:
    """The inverse of `write_words`."""
    return np.frombuffer(data, "<u4").astype(np.uint32)


def pack(data: bytes) -> bytes:
    """A section that says how long it is."""
    return struct.pack("<I", len(data)) + data


def unpack(data: memoryview) -> tuple[memoryview, memoryview]:
    """A section that `pack` made, and what follows it.

    Raises:
        CodingError: the data ends before it does.
    """
    (length,) = struct.unpack_from("<I", data)
    if len(data) < 4 + length:
        raise CodingError("damaged code of a tensor: it ends too early")
    return data[4 : 4 + length], data[4 + length :]


def array(data: memoryview, dtype: np.dtype[Any], count: int) -> tuple[Words, memoryview]:
    """So many numbers, and what follows them.

    Raises:
        CodingError: the data ends before they do.
    """
    size = count * dtype.itemsize
    if len(data) < size:
        raise CodingError("damaged code of a tensor: it ends too early")
    return np.frombuffer(data[:size], dtype), data[size:]
