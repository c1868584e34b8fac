"""Costs in closed form: what any choice of channels would cost, in microseconds, without running anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from torch import Tensor

from lightning_compress.coupling.labels import Vector

__all__ = ["Mask", "Products", "volume"]

Mask = npt.NDArray[np.bool_]
"""One boolean for each class: whether it is cut."""


class Products:
    """Sum of constant x product of living counts, over all ops, for any choice of what is cut.

    Args:
        classes: the class of each label.
        count: number of classes.
        terms: for each op a constant and the label vectors whose living counts multiply it.
    """

    def __init__(self, classes: Vector, count: int, terms: Sequence[tuple[float, tuple[Vector, ...]]]) -> None:
        index: dict[int, int] = {}
        vectors: list[Vector] = []
        width = max((len(factors) for _, factors in terms), default=0)
        self.constants = np.array([constant for constant, _ in terms], dtype=np.float64)
        self.factors = np.full((len(terms), width), -1)
        for row, (_, factors) in enumerate(terms):
            for column, vector in enumerate(factors):
                if id(vector) not in index:
                    index[id(vector)] = len(vectors)
                    vectors.append(classes[vector])
                self.factors[row, column] = index[id(vector)]
        rows = np.repeat(np.arange(len(vectors)), [len(v) for v in vectors])
        columns = np.concatenate([*vectors, np.empty(0, np.int64)])
        shape = (len(vectors) + 1, count)
        self.matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)

    def __call__(self, cut: Mask) -> float:
        """The sum when the classes in `cut` are gone."""
        counts = self.matrix @ (~cut).astype(np.float64)
        counts[-1] = 1.0  # factor -1: none
        return float((self.constants * counts[self.factors].prod(axis=1)).sum())


def volume(tensor: Tensor, labels: dict[int, Vector], unit: int) -> tuple[float, tuple[Vector, ...]]:
    """The term of a tensor's elements, each of which costs `unit`."""
    plain = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in labels)
    return float(plain * unit), tuple(labels.values())
