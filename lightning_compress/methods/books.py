"""Codebooks of rows: where each output of a layer has its own few values, an index into these is all that is coded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "RowBooks", "row_books"]

Words = NDArray[Any]

LARGEST = 16
"""Values that a row may have, zero aside."""


@dataclass(frozen=True)
class RowBooks:
    """The values of each row, ascending, one row after the other.

    Attributes:
        sizes: how many each row has, uint8.
        values: all of them.
    """

    sizes: NDArray[np.uint8]
    values: Words

    def look_up(self, rows: NDArray[np.int64], index: NDArray[np.int32]) -> Words:
        """The values at some places of their rows.

        Args:
            rows: the row of each.
            index: its place among the values of that row.

        Raises:
            ValueError: a place that a row does not have.
        """
        if (index >= self.sizes[rows]).any():
            raise ValueError("a row has fewer values")
        found: Words = self.values[self._starts()[rows] + index]
        return found

    def _starts(self) -> NDArray[np.int64]:
        sizes = self.sizes.astype(np.int64)
        return sizes.cumsum() - sizes


def row_books(rows: NDArray[np.int64], values: Words, count: int) -> tuple[RowBooks, NDArray[np.int32]] | None:
    """The codebooks of rows, and each value's place in that of its row; None, where a row has too many values.

    Args:
        rows: the row of each value, ascending.
        values: the values.
        count: how many rows there are.

    Example:
        >>> books, index = row_books(np.array([0, 0, 0, 1, 1]), np.array([5, -5, 5, 7, -7]), 3)
        >>> books.sizes.tolist(), books.values.tolist(), index.tolist()
        ([2, 2, 0], [-5, 5, -7, 7], [1, 0, 1, 1, 0])
    """
    if not len(values) or len(np.unique(values[rows == rows[0]])) > LARGEST:
        return None
    order = np.lexsort((values, rows))
    row, value = rows[order], values[order]
    first = np.ones(len(order), bool)
    first[1:] = (row[1:] != row[:-1]) | (value[1:] != value[:-1])
    sizes = np.bincount(row[first], minlength=count)
    if sizes.max() > LARGEST:
        return None
    books = RowBooks(sizes.astype(np.uint8), value[first])
    index = np.empty(len(order), np.int32)
    index[order] = first.cumsum() - 1 - books._starts()[row]
    return books, index
