"""Groups of alike: which outputs of a layer are made from which others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["assign", "gather_groups"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ROUNDS = 100
"""Most rounds of exchanges; a dozen is usual."""


def assign(loss: Tensor) -> Tensor:
    """The one-to-one assignment of least total loss (the Hungarian method).

    Args:
        loss: of row i in column j, [n, n].

    Returns:
        The column of each row, [n].

    Example:
        >>> assign(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        tensor([1, 0])
    """
    return torch.from_numpy(linear_sum_assignment(loss.cpu().numpy())[1]).to(loss.device)


def gather_groups(loss: Tensor, size: int) -> Tensor:
    """Share items out into groups of a size, each with a head that the others are made from, at little total loss.

    Heads are chosen greedily, the rest assigned to them by the Hungarian method, and then items change places as long
    as that helps. The best of all is NP-hard to find.

    Args:
        loss: what is lost when item j is made from item i, [n, n]; the diagonal does not count.
        size: items of a group, at least 2.

    Returns:
        The items of each group, the head first, [n / size rounded up, size]; -1 where there are none left.

    Example:
        >>> points = torch.tensor([0.0, 10.0, 0.1, 10.1])
        >>> gather_groups((points - points[:, None]).square(), 2).sort().values.tolist()
        [[0, 2], [1, 3]]
    """
    n = len(loss)
    groups = -(-n // size)
    padded = np.zeros((groups * size, groups * size))
    padded[:n, :n] = loss.detach().double().cpu().numpy()
    padded[n:] = 1 + padded.max() * len(padded)  # what pads the last group is never a head
    np.fill_diagonal(padded, 0.0)
    heads = _heads(padded, groups, n)
    rest = np.setdiff1d(np.arange(len(padded)), heads)
    slots = np.repeat(heads, size - 1)
    rows, columns = linear_sum_assignment(padded[slots][:, rest])
    table = np.concatenate([heads[:, None], rest[columns[np.argsort(rows)]].reshape(groups, size - 1)], 1)
    table = _exchange(padded, table)
    table[table >= n] = -1
    return torch.from_numpy(table).to(loss.device)


def _heads(loss: Floats, count: int, real: int) -> Indices:
    """Items from which all others are made best, if each may be made from any of them."""
    nearest = loss[:real].max(0)
    heads: list[int] = []
    for _ in range(count):
        totals = np.minimum(loss[:real], nearest).sum(1)
        totals[heads] = np.inf
        heads.append(int(totals.argmin()))
        nearest = np.minimum(nearest, loss[heads[-1]])
    return np.array(heads)


def _exchange(loss: Floats, table: Indices) -> Indices:
    """Let heads and others change places, within a group and between two, while the total falls."""
    groups, size = table.shape
    least = 1e-12 * (1e-300 + loss[table[:, :1], table].sum())
    lines = np.arange(groups)
    for _ in range(ROUNDS):
        alone = loss[table[:, :, None], table[:, None, :]].sum(2)  # of a group with each of its items as the head
        best = alone.argmin(1)
        head = np.where(alone[:, 0] - alone[lines, best] > least, best, 0)
        table[lines, 0], table[lines, head] = table[lines, head], table[lines, 0].copy()
        gain = _gains(loss, table)
        partner = gain.argmax(1)
        found = gain[np.arange(groups * size), partner]
        busy: set[int] = set()
        flat: Any = table.reshape(-1)
        for slot in np.argsort(-found):
            if found[slot] <= least:
                break
            other = int(partner[slot])
            both = {int(slot) // size, other // size}
            if not busy & both:  # the gains of other exchanges in these groups are no longer true
                flat[slot], flat[other] = flat[other], flat[slot]
                busy |= both
        if not busy and not head.any():
            break
    return table


def _gains(loss: Floats, table: Indices) -> Floats:
    """What is gained when the items in two slots of different groups change places, [slots, slots]."""
    groups, size = table.shape
    heads, rest = table[:, 0], table[:, 1:]
    cost = loss[heads[:, None], rest].sum(1)
    # of a slot's group, when the slot holds another item
    as_head = loss[:, rest].sum(2).T[:, None, :]
    as_other = cost[:, None, None] - loss[heads[:, None], rest][:, :, None] + loss[heads][:, None, :]
    replaced = np.concatenate([as_head, as_other], 1).reshape(groups * size, -1)[:, table.reshape(-1)]
    before = np.repeat(cost, size)
    gain: Floats = before[:, None] + before - replaced - replaced.T
    group = np.repeat(np.arange(groups), size)
    gain[group[:, None] == group] = 0.0
    return gain
