"""Entropy coding of tensors: exact to the bit, and small where values are zero or occur many times.

Deep Compression (Han, Mao and Dally 2015, arXiv 1510.00149) stores a pruned and shared layer as distances between its
nonzero weights and indices into a codebook, both with Huffman codes. Here where the zeros are is coded by an arithmetic
coder whose model learns on the way which inputs of a layer are used (its rows tell how full they are), and the values
by the frequencies of the codebook, of the tensor or, where that is shorter, of each of its rows; neither is worse than
the entropy of what it replaces, and both need no table of codes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_compress.methods.books import LARGEST, RowBooks, row_books
from lightning_compress.methods.sections import CodingError, Words, array, pack, read_words, unpack, write_words
from lightning_compress.methods.zeros import decode_mask, encode_mask

__all__ = ["CodingError", "decode", "encode", "worth_trying"]

_HEADER = struct.Struct("<BBQI")  # version, flags, nonzero elements, entries of the codebook
_VERSION = 1
_WITH_BOOKS = 2  # the version that codebooks of rows came with; what has none is written as before
_ZEROS, _ROWS, _TABLE = 1, 2, 4  # flags: there are zeros; rows say how full they are; values have a codebook
_BOOKS = 8  # each row has a codebook

MAX_ROWS = 4096
MIN_COLUMNS = 16
"""A matrix with more rows, or fewer columns, is coded as one row."""

MAX_TABLE = 1 << 16
TABLE_SHARE = 0.5
"""A codebook has at most so many entries, and at most this many for each value that it stands for."""

_SAMPLE = 4096


def worth_trying(tensor: Tensor) -> bool:
    """Whether coding may make a tensor smaller, told by a few of its elements."""
    if tensor.numel() < 64 or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    sample = _words(tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)])
    return bool((sample == 0).mean() > 0.05 or len(np.unique(sample)) < sample.size // 2)


def encode(tensor: Tensor) -> bytes:
    """Code a tensor.

    Args:
        tensor: any dense tensor; its first dim are the rows of a matrix.

    Returns:
        What `decode` makes the same bits of; it may be longer than the tensor, if there is nothing to gain.

    Example:
        >>> weight = torch.zeros(64, 64)
        >>> weight[::4, ::8] = 0.5
        >>> code = encode(weight)
        >>> len(code) < 300, torch.equal(decode(code, weight.dtype, weight.shape), weight)
        (True, True)
    """
    words = _words(tensor)
    rows, columns = _layout(words.shape)
    matrix = words.reshape(rows, columns)
    nonzero = matrix != 0
    count = int(nonzero.sum())
    coded, flag, entries = _encode_book(matrix[nonzero], nonzero)
    flags = (_ZEROS if count < matrix.size else 0) | flag
    parts = [b""]
    if 0 < count < matrix.size:
        by_rows, plain = encode_mask(nonzero, count, True), encode_mask(nonzero, count, False)
        flags |= _ROWS if len(by_rows) < len(plain) else 0
        parts.append(pack(by_rows if flags & _ROWS else plain))
    parts.append(coded)
    parts[0] = _HEADER.pack(_WITH_BOOKS if flag & _BOOKS else _VERSION, flags, count, entries)
    return b"".join(parts)


def decode(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor that `encode` was given.

    Args:
        data: what it returned.
        dtype: of the tensor.
        shape: of the tensor.

    Raises:
        CodingError: the data is not a coded tensor of this type and shape.
    """
    empty = _words(torch.empty(0, dtype=dtype))
    rows, columns = _layout(tuple(shape))
    size = rows * columns
    try:
        version, flags, count, entries = _HEADER.unpack_from(data)
        if version not in (_VERSION, _WITH_BOOKS) or (flags & _BOOKS and version == _VERSION) or count > size:
            raise CodingError(f"coded by another version ({version}), or of another shape than {list(shape)}")
        rest = memoryview(data)[_HEADER.size :]
        nonzero = np.full((rows, columns), count == size)
        if 0 < count < size:
            stream, rest = unpack(rest)
            nonzero = decode_mask(stream, rows, columns, count, bool(flags & _ROWS))
        if flags & _BOOKS:
            sizes, rest = array(rest, np.dtype(np.uint8), rows)
            book, rest = array(rest, empty.dtype, int(sizes.sum()))
            frequency, rest = array(rest, np.dtype("<u2"), entries)
            stream, rest = unpack(rest)
            index = _decode_values(stream, frequency, count)
            values = RowBooks(sizes, book).look_up(np.nonzero(nonzero)[0], index)
        elif flags & _TABLE:
            table, rest = array(rest, empty.dtype, entries)
            frequency, rest = array(rest, np.dtype("<u2"), entries)
            stream, rest = unpack(rest)
            values = table[_decode_values(stream, frequency, count)]
        else:
            values, rest = array(rest, empty.dtype, count)
        matrix = np.zeros((rows, columns), empty.dtype)
        matrix[nonzero] = values
    except (struct.error, ValueError, IndexError, AssertionError) as error:
        raise CodingError(f"damaged code of a tensor: {error}") from error
    if len(rest):
        raise CodingError(f"damaged code of a tensor: {len(rest)} bytes are left over")
    return torch.from_numpy(matrix.reshape(-1)).view(dtype).reshape(tuple(shape))


def _words(tensor: Tensor) -> Words:
    """The bits of a tensor as integers, in its shape."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    size = tensor.dtype.itemsize
    if size > 8:
        raise CodingError(f"cannot code a tensor of {tensor.dtype}")
    words: Words = flat.view(torch.uint8).numpy().view(np.dtype(f"<i{size}"))
    return words.reshape(tuple(tensor.shape))


def _layout(shape: Sequence[int]) -> tuple[int, int]:
    size = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    if not size or rows > MAX_ROWS or size // rows < MIN_COLUMNS:
        rows = 1
    return rows, size // rows


def _encode_book(values: Words, nonzero: NDArray[np.bool_]) -> tuple[bytes, int, int]:
    """The values that are not zero, in the shortest way; its flag, and how many frequencies there are."""
    table, index, frequency = _table(values)
    if len(table):
        coded = table.tobytes() + frequency.tobytes() + pack(_encode_values(index, frequency))
    else:
        coded = values.tobytes()
    found = None
    if len(nonzero) > 1 and not 0 < len(table) <= LARGEST:  # else all rows have the same few values
        found = row_books(np.nonzero(nonzero)[0], values, len(nonzero))
    if found is not None:
        books, index = found
        frequency = _frequencies(np.bincount(index))
        sections = [books.sizes.tobytes(), books.values.tobytes(), frequency.tobytes()]
        own = b"".join(sections) + pack(_encode_values(index, frequency))
        if len(own) < len(coded):
            return own, _BOOKS, len(frequency)
    return coded, _TABLE if len(table) else 0, len(table)


def _table(values: Words) -> tuple[Words, NDArray[np.int32], NDArray[np.uint16]]:
    """The codebook, each value's place in it, and frequencies; an empty one where it would not pay."""
    nothing = values[:0], np.empty(0, np.int32), np.empty(0, np.uint16)
    if len(values) > _SAMPLE:
        sample = values[:: len(values) // _SAMPLE]
        if len(np.unique(sample)) > TABLE_SHARE * len(sample):
            return nothing
    table, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    if not len(table) or len(table) > min(MAX_TABLE, TABLE_SHARE * len(values)):
        return nothing
    return table, index.astype(np.int32), _frequencies(counts)


def _frequencies(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    frequency: NDArray[np.uint16] = np.clip(np.rint(counts * (65535 / counts.max())), 1, 65535).astype("<u2")
    return frequency


def _encode_values(index: NDArray[np.int32], frequency: NDArray[np.uint16]) -> bytes:
    if len(frequency) == 1:
        return b""
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(index, _categorical(frequency))
    return write_words(encoder.get_compressed())


def _decode_values(data: memoryview, frequency: NDArray[np.uint16], count: int) -> NDArray[np.int32]:
    if len(frequency) == 1:
        return np.zeros(count, np.int32)
    decoder = constriction.stream.queue.RangeDecoder(read_words(data))
    index: NDArray[np.int32] = decoder.decode(_categorical(frequency), count)
    return index


def _categorical(frequency: NDArray[np.uint16]) -> Any:
    return constriction.stream.model.Categorical(frequency / frequency.astype(np.int64).sum(), perfect=False)
