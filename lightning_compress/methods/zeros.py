"""Where the zeros of a matrix are, coded by a model that learns on the way which of its columns are used.

The model is made with additions, multiplications and divisions alone, which every machine rounds alike.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_compress.methods.sections import array, read_words, write_words

__all__ = ["decode_mask", "encode_mask"]

Floats = NDArray[np.float64]

PRIOR = 4.0
"""How many rows the density of the whole tensor counts for, when that of a column is learned."""

_LEVELS = 255  # of how full a row is


def encode_mask(nonzero: NDArray[np.bool_], count: int, by_rows: bool) -> bytes:
    """Code a mask.

    Args:
        nonzero: [rows, columns].
        count: how many are true: some, and not all.
        by_rows: whether each row says how full it is, which the model then knows.

    Example:
        >>> mask = np.zeros((64, 64), bool)
        >>> mask[::4, ::8] = True
        >>> code = encode_mask(mask, int(mask.sum()), True)
        >>> len(code), bool((decode_mask(memoryview(code), 64, 64, int(mask.sum()), True) == mask).all())
        (88, True)
    """
    levels = _levels(nonzero) if by_rows else np.empty(0, np.uint8)
    encoder = constriction.stream.queue.RangeEncoder()
    model = constriction.stream.model.Bernoulli(perfect=False)
    learned = _Densities(len(nonzero), nonzero.shape[1], count)
    for number, row in enumerate(nonzero):
        level = levels[number] if by_rows else None
        if level is None or 0 < level < _LEVELS:
            encoder.encode(row.astype(np.int32), model, learned.expected(level))
        learned.learn(row)
    return levels.tobytes() + write_words(encoder.get_compressed())


def decode_mask(data: memoryview, rows: int, columns: int, count: int, by_rows: bool) -> NDArray[np.bool_]:
    """The mask that `encode_mask` was given.

    Raises:
        CodingError: the data ends too early.
    """
    levels, data = array(data, np.dtype(np.uint8), rows if by_rows else 0)
    decoder = constriction.stream.queue.RangeDecoder(read_words(data))
    model = constriction.stream.model.Bernoulli(perfect=False)
    learned = _Densities(rows, columns, count)
    nonzero = np.zeros((rows, columns), bool)
    for number, row in enumerate(nonzero):
        level = levels[number] if by_rows else None
        if level is None or 0 < level < _LEVELS:
            row[:] = decoder.decode(model, learned.expected(level)) != 0
        else:
            row[:] = level == _LEVELS
        learned.learn(row)
    return nonzero


def _levels(nonzero: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How full each row is; the first and the last level are kept for those that are empty and full."""
    share = nonzero.mean(1)
    level = np.clip(np.rint(share * _LEVELS), 1, _LEVELS - 1)
    return np.where(share == 0, 0, np.where(share == 1, _LEVELS, level)).astype(np.uint8)


class _Densities:
    """How likely each element of the next row is not zero, by what the rows before it were."""

    def __init__(self, rows: int, columns: int, count: int) -> None:
        self.whole = count / (rows * columns)
        self.found = np.zeros(columns)
        self.rows = 0

    def expected(self, level: int | None) -> Floats:
        column: Floats = (self.found + PRIOR * self.whole) / (self.rows + PRIOR)
        if level is not None:  # odds multiply where rows and columns are independent
            share = level / _LEVELS
            odds = column / (1 - column) * (share / (1 - share)) / (self.whole / (1 - self.whole))
            column = odds / (1 + odds)
        return np.clip(column, 1e-6, 1 - 1e-6)

    def learn(self, row: NDArray[np.bool_]) -> None:
        self.found += row
        self.rows += 1
