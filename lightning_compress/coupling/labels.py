"""Labels: the integers that say which slices of which tensors belong together.

Every index of every dim of every parameter and buffer has a label of its own. As the network runs, each op says which
labels meet (`LabelSpace.unite`) and which can never go (`LabelSpace.freeze`); at the end the classes of united labels
are what can be cut, all together or not at all. Unions are collected as edges and solved at once, in C.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["DATA", "KERNEL", "LabelSpace", "Labels", "Vector"]

Vector = npt.NDArray[np.int64]
Labels = dict[int, Vector]
"""dim -> one label for each index. A dim that is missing holds data (batch, space, constants): it has no channels."""

DATA = 0
"""The label of what cannot be cut: padding, constants."""

KERNEL = "the extent of a kernel"
"""The reason given for the spatial dims of a convolution's weight, which nobody expects to be cut."""


class LabelSpace:
    """Allocates labels and collects what is said about them.

    Example:
        >>> space = LabelSpace()
        >>> a, b = space.new(3), space.new(3)
        >>> space.unite(a, b[::-1])
        >>> space.freeze(b[:1], "it reaches the output")
        >>> classes, frozen = space.solve()
        >>> classes[a].tolist() == classes[b[::-1]].tolist(), bool(frozen[classes[a[2]]])
        (True, True)
    """

    def __init__(self) -> None:
        """Start with the one label `DATA`."""
        self.size = 1
        self.reasons: dict[str, list[Vector]] = {}
        self._left: list[Vector] = []
        self._right: list[Vector] = []

    def new(self, count: int) -> Vector:
        """`count` fresh labels."""
        self.size += count
        return np.arange(self.size - count, self.size, dtype=np.int64)

    def unite(self, a: Vector, b: Vector) -> None:
        """The slices labelled `a[i]` and `b[i]` live or die together, for every i."""
        if a is b:
            return
        self._left.append(a)
        self._right.append(b)

    def freeze(self, labels: Vector, reason: str) -> None:
        """These slices can never be cut; `reason` completes 'not cut: ...'."""
        self.reasons.setdefault(reason, []).append(labels)

    def solve(self) -> tuple[Vector, npt.NDArray[np.bool_]]:
        """The class of every label, and for every class whether it is frozen."""
        left = np.concatenate([*self._left, np.empty(0, np.int64)])
        right = np.concatenate([*self._right, np.empty(0, np.int64)])
        data = np.union1d(right[left == DATA], left[right == DATA])
        real = (left != DATA) & (right != DATA)
        edges = coo_array((np.ones(real.sum(), np.int8), (left[real], right[real])), shape=(self.size, self.size))
        count, classes = connected_components(edges, directed=False)
        frozen = np.zeros(count, dtype=bool)
        frozen[classes[DATA]] = True
        frozen[classes[data]] = True
        for vectors in self.reasons.values():
            frozen[classes[np.concatenate(vectors)]] = True
        return classes.astype(np.int64), frozen

    def explain(self, classes: Vector) -> dict[int, str]:
        """Class -> why it is frozen, for those that were frozen by name; the first reason given wins."""
        explained: dict[int, str] = {}
        for reason, vectors in self.reasons.items():
            for index in np.unique(classes[np.concatenate(vectors)]):
                explained.setdefault(int(index), reason)
        return explained
