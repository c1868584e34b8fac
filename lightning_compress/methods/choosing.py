"""Choosing: which channels go, given their scores and what is allowed to stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import BudgetError, bisect, meant_as_share
from lightning_compress.coupling import Coupling, Group, Mask
from lightning_compress.coupling.labels import Vector
from lightning_compress.edits import named_tensors
from lightning_compress.methods.criteria import Scores, check_criterion
from lightning_compress.wording import require_choice

__all__ = ["Chooser", "Ranking", "Selection", "costs", "structure"]

Ranking = Literal["global", "layer", "isomorphic"]
"""Who competes with whom, see `Selection`."""

UNITS: Mapping[str, Callable[[Coupling, Mask], float]] = {
    "macs": Coupling.macs,
    "params": Coupling.params,
    "bytes": Coupling.bytes,
}


FULL = 0.99
"""How much of a limit is to be used; below it, channels are traded between layers."""

MANY = 24
"""Layers above which a single channel is too little to be worth trading."""


@dataclass(frozen=True)
class Selection:
    """How channels are chosen.

    Attributes:
        criterion: a name in `criteria.CRITERIA`.
        ranking: `global`: all layers compete; `layer`: each layer loses the same fraction; `isomorphic`: layers of the
            same structure compete (see `structure`), and each such class loses the same fraction (Fang et al. 2024,
            'Isomorphic pruning', arXiv 2407.04616).
        round_to: layers keep a multiple of this many channels (those that have as many).
        exclude: patterns of module names (`fnmatch`) whose output channels stay.
        floor: smallest fraction of a layer's channels that stays; at least one channel does.
        sensitivity: power of each layer's measured sensitivity that its scores are multiplied by; 0: not measured.

    Raises:
        ValueError: a value out of range.
    """

    criterion: str = "l2"
    ranking: Ranking = "global"
    round_to: int = 1
    exclude: Sequence[str] = ()
    floor: float = 0.1
    sensitivity: float = 0.0

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        require_choice("ranking", self.ranking, get_args(Ranking))
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"`round_to` must be an integer of at least 1, got {self.round_to!r}")
        if isinstance(self.exclude, str):
            raise ValueError(
                f"`exclude` must be a list of patterns, got the string {self.exclude!r}; give [{self.exclude!r}]"
            )
        if not 0 <= self.floor < 1:
            raise ValueError(f"`floor` must be in [0, 1), got {self.floor!r}")
        if not 0 <= self.sensitivity < np.inf:
            raise ValueError(f"`sensitivity` must be a power of at least 0, got {self.sensitivity!r}")
        if self.sensitivity and self.ranking == "layer":
            raise ValueError("`sensitivity` weighs layers against each other: use ranking='global' or 'isomorphic'")


def structure(coupling: Coupling, group: Group) -> frozenset[tuple[object, ...]]:
    """What a layer is made of: the set of the places its channels live in, whatever their number and width.

    Args:
        coupling: the traced network.
        group: the layer.

    Returns:
        For each place: the class of the module, what it calls the tensor, the dim, the kernel, whether it is grouped.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(*[nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)])
        >>> coupling = trace_coupling(net, torch.zeros(1, 1, 4, 4))
        >>> first, second, third = (structure(coupling, group) for group in coupling.groups)
        >>> first == second, first == third
        (True, False)
    """
    tensors = dict(named_tensors(coupling.model))
    places = set()
    for name, dim in group.locations:
        path, _, leaf = name.rpartition(".")
        module = coupling.model.get_submodule(path)
        grouped = getattr(module, "groups", 1) != 1
        places.add((type(module), leaf, dim, tuple(tensors[name].shape[2:]), grouped))
    return frozenset(places)


def costs(coupling: Coupling, cut: Mask | None = None) -> dict[str, float]:
    """What the network costs in each unit, once `cut` is gone."""
    mask = coupling.nothing_cut() if cut is None else cut
    found = {unit: cost(coupling, mask) for unit, cost in UNITS.items()}
    return found if cut is not None else {**found, "bytes": float(artifact_bytes(coupling.model))}


class Chooser:
    """Turns scores into a choice: the worst channels first, within what each layer must keep."""

    def __init__(self, coupling: Coupling, selection: Selection, scores: Scores) -> None:
        self.coupling, self.selection = coupling, selection
        self.groups = [group for group in coupling.groups if not np.isnan(scores[group.classes]).any()]
        self.ranked = [group.classes[np.argsort(scores[group.classes], kind="stable")] for group in self.groups]
        self.least = [
            self._round(len(g.classes), max(1, int(np.ceil(len(g.classes) * selection.floor)))) for g in self.groups
        ]
        cuttable = [r[: len(r) - least] for r, least in zip(self.ranked, self.least, strict=True)]
        everything = np.concatenate([*cuttable, np.empty(0, np.int64)])
        self.order = everything[np.argsort(scores[everything], kind="stable")]
        self.shares = np.empty(0)
        if selection.ranking == "isomorphic":
            self._interleave()

    def _interleave(self) -> None:
        """Order channels by the share of its class that has gone with each: prefixes then take as much of every class.

        Within a class the order stays that of the scores.
        """
        kinds = [structure(self.coupling, group) for group in self.groups]
        kind_of = np.empty(self.coupling.count, np.int64)
        for group, kind in zip(self.groups, kinds, strict=True):
            kind_of[group.classes] = kinds.index(kind)
        of = kind_of[self.order]
        share = np.empty(len(self.order))
        for kind in np.unique(of):
            total = sum(len(group.classes) for group in self.groups if kind_of[group.classes[0]] == kind)
            share[of == kind] = np.arange(1, (of == kind).sum() + 1) / total
        order = np.argsort(share, kind="stable")
        self.order, self.shares = self.order[order], share[order]

    def _round(self, size: int, keep: int) -> int:
        """`keep` rounded up to a multiple, or all of a layer that is smaller than one."""
        step = self.selection.round_to
        return min(size, -(-keep // step) * step) if size >= step else size

    def mask(self, keep: Sequence[int]) -> Mask:
        """Cut each layer down to `keep` channels."""
        cut = self.coupling.nothing_cut()
        for ranked, count in zip(self.ranked, keep, strict=True):
            cut[ranked[: len(ranked) - count]] = True
        return cut

    def prefix(self, length: int) -> Mask:
        """Cut the `length` worst channels of the whole network."""
        cut = self.coupling.nothing_cut()
        cut[self.order[:length]] = True
        if self.selection.round_to == 1:
            return cut
        return self.mask(
            [self._down(len(r), int((~cut[r]).sum()), m) for r, m in zip(self.ranked, self.least, strict=True)]
        )

    def _down(self, size: int, keep: int, least: int) -> int:
        step = self.selection.round_to
        return size if keep == size else max(least, keep // step * step)

    def layerwise(self, amount: float) -> Mask:
        """Cut the fraction `amount` of each layer."""
        keep = [
            self._down(len(r), len(r) - int(len(r) * amount), m) for r, m in zip(self.ranked, self.least, strict=True)
        ]
        return self.mask(keep)

    def by_ratio(self, ratio: float) -> Mask:
        """Cut a fraction of the channels."""
        if self.selection.ranking == "layer":
            return self.layerwise(ratio)
        if self.selection.ranking == "isomorphic":
            return self.prefix(int(np.searchsorted(self.shares, ratio, side="right")))
        return self.prefix(min(len(self.order), round(ratio * sum(map(len, self.ranked)))))

    def smallest(self) -> Mask:
        """Cut all that may go."""
        return self.mask(self.least)

    def within(self, limits: Mapping[str, float]) -> Mask:
        """The smallest cut that meets the limits, then whatever can be given back under them."""

        def used(cut: Mask) -> float:
            return max(
                UNITS[unit](self.coupling, cut) / limit if limit > 0 else np.inf for unit, limit in limits.items()
            )

        def fits(cut: Mask) -> bool:
            return used(cut) <= 1

        if fits(self.coupling.nothing_cut()):
            return self.coupling.nothing_cut()
        if self.selection.ranking == "layer":
            candidates, steps = (lambda n: self.layerwise(n / 1024)), 1024
        else:
            candidates, steps = self.prefix, len(self.order)
        found = bisect(lambda n: fits(candidates(n)), 0, steps)
        if found is None:
            self._refuse(limits, candidates(steps))
        cut = candidates(found or 0)
        if self.selection.round_to > 1:
            return cut
        return self._swap(self._give_back(cut, fits), used)

    def _give_back(self, cut: Mask, fits: Callable[[Mask], bool], tries: int = 200) -> Mask:
        """Bring back the best of the cut channels, as long as the limits hold."""
        for channel in self.order[::-1][cut[self.order[::-1]]][:tries]:
            cut[channel] = False
            cut[channel] = not fits(cut)
        return cut

    def _swap(self, cut: Mask, used: Callable[[Mask], float]) -> Mask:
        """Where channels are few and dear: use up the limits by trading one layer's worst for another's best."""
        while used(cut) < FULL and len(self.ranked) <= MANY:
            best, better = used(cut), None
            for trade in self._trades(cut):
                candidate = cut.copy()
                candidate[trade[0]], candidate[trade[1]] = True, False
                if best < used(candidate) <= 1:
                    best, better = used(candidate), candidate
            if better is None:
                break
            cut = better
        return cut

    def _trades(self, cut: Mask) -> Iterator[tuple[Vector, Vector]]:
        """Channels to cut of one layer and to bring back of another, one or two of each."""
        for (ranked, least), other in product(zip(self.ranked, self.least, strict=True), self.ranked):
            kept, gone = ranked[~cut[ranked]], other[cut[other]]
            for fewer, more in ((1, 1), (1, 2), (2, 1)):
                if other is not ranked and len(kept) - fewer >= least and len(gone) >= more:
                    yield kept[:fewer], gone[-more:]

    def _refuse(self, limits: Mapping[str, float], smallest: Mask) -> None:
        dense, least = costs(self.coupling), costs(self.coupling, smallest)
        worst = max(limits, key=lambda unit: (least[unit] - limits[unit]) / dense[unit])
        share = f"{least[worst]:,.0f} ({least[worst] / dense[worst]:.3f} of it)"
        raise BudgetError(
            f"a budget of {limits[worst]:,.0f} {worst} cannot be met: this network has {dense[worst]:,.0f}, and the "
            f"lowest reachable by cutting channels is {share}, with floor={self.selection.floor} and "
            f"{len(self.groups)} layers that can be cut; ask for more, or lower `floor`"
            f"{meant_as_share(worst, limits[worst])}"
        )
