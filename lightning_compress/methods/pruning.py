"""Channel pruning: which channels go, under a budget, and the edit that removes them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget, BudgetError, bisect
from lightning_compress.calls import Call, as_calls
from lightning_compress.coupling import Coupling, Location, Mask, Settled, settle, trace_coupling
from lightning_compress.edits import Edit, apply_edits, skeleton
from lightning_compress.methods.criteria import Scores, check_criterion, score_channels

__all__ = ["ChannelPlan", "Pruning", "Selection", "costs", "plan_channels", "prune_channels"]

UNITS: Mapping[str, Callable[[Coupling, Mask], float]] = {
    "macs": Coupling.macs,
    "params": Coupling.params,
    "bytes": Coupling.bytes,
}


@dataclass(frozen=True)
class Selection:
    """How channels are chosen.

    Attributes:
        criterion: a name in `criteria.CRITERIA`.
        ranking: `global`: all layers compete; `layer`: each layer loses the same fraction.
        round_to: layers keep a multiple of this many channels (those that have as many).
        exclude: patterns of module names (`fnmatch`) whose output channels stay.
        floor: smallest fraction of a layer's channels that stays; at least one channel does.

    Raises:
        ValueError: a value out of range.
    """

    criterion: str = "l2"
    ranking: Literal["global", "layer"] = "global"
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    floor: float = 0.1

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        if self.ranking not in ("global", "layer"):
            raise ValueError(f"`ranking` must be 'global' or 'layer', got {self.ranking!r}")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"`round_to` must be an integer of at least 1, got {self.round_to!r}")
        if isinstance(self.exclude, str):
            raise ValueError(f"`exclude` must be a list of patterns, got the string {self.exclude!r}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"`floor` must be in [0, 1), got {self.floor!r}")


@dataclass(frozen=True)
class ChannelPlan:
    """A proved plan.

    Attributes:
        coupling: the traced network, with what the proof froze.
        settled: the edit with its proof; None when there is nothing to cut.
    """

    coupling: Coupling
    settled: Settled | None


@dataclass(frozen=True)
class Pruning:
    """What `prune_channels` did.

    Attributes:
        edits: the edits that were applied; none when nothing could be cut.
        proof: `exact`, `restricted` (norms over channels run over the survivors) or `nothing cut`.
        frozen: location -> why (some of) its channels stay.
        costs: unit -> (before, after).
    """

    edits: tuple[Edit, ...]
    proof: str
    frozen: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def costs(coupling: Coupling, cut: Mask | None = None) -> dict[str, float]:
    """What the network costs in each unit, once `cut` is gone."""
    mask = coupling.nothing_cut() if cut is None else cut
    found = {unit: cost(coupling, mask) for unit, cost in UNITS.items()}
    return found if cut is not None else {**found, "bytes": float(artifact_bytes(coupling.model))}


def plan_channels(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    selection: Selection,
    *,
    limits: Mapping[str, float] | None = None,
    ratio: float | None = None,
    saliency: Mapping[Location, Tensor] | None = None,
    keep: Mapping[str, str] | None = None,
    seed: int = 0,
) -> ChannelPlan:
    """Plan and prove, without touching the network.

    Args:
        model: the network.
        inputs: what it is called with.
        selection: how channels are chosen.
        limits: unit -> absolute cost allowed (see `costs`). Either this or `ratio`.
        ratio: fraction of the channels to cut.
        saliency: gathered terms for the criteria that need them.
        keep: tensor name -> why none of its channels may go.
        seed: for the criteria that draw.

    Raises:
        BudgetError: the limits cannot be met, with the lowest that can.
        ValueError: no channel can be cut at all; a pattern that matches nothing; scores that are not finite.
    """
    if (limits is None) == (ratio is None):
        raise ValueError("give either a budget or a ratio")
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"`ratio` must be in (0, 1), got {ratio!r}")
    coupling = trace_coupling(model, inputs)
    _exclude(coupling, selection.exclude)
    for tensor, reason in (keep or {}).items():
        coupling.freeze([classes for (name, _), classes in coupling.locations.items() if name == tensor], reason)
    if not coupling.groups:
        why = "; ".join(sorted(set(coupling.reasons.values()))[:5])
        raise ValueError(f"there is no channel in this network that could be cut: {why}")
    scores = score_channels(coupling, selection.criterion, saliency, seed)

    targets = dict(limits or {})
    if "bytes" in targets:  # the file holds a header and the edits beside the tensors
        targets["bytes"] -= artifact_bytes(model) - coupling.bytes(coupling.nothing_cut())

    def choose(current: Coupling) -> Mask:
        chooser = _Chooser(current, selection, scores)
        return chooser.by_ratio(ratio) if ratio is not None else chooser.within(targets)

    while True:
        settled = settle(coupling, choose, "channel_pruning")
        if settled is None or limits is None or "bytes" not in limits:
            break
        trial = skeleton(model)
        apply_edits(trial, [settled.keep])
        excess = artifact_bytes(trial) - limits["bytes"]
        if excess <= 0:
            break
        targets["bytes"] -= excess  # ends: below what is reachable, the chooser refuses
    return ChannelPlan(coupling, settled)


def prune_channels(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    budget: Budget | None = None,
    *,
    ratio: float | None = None,
    criterion: str = "l2",
    ranking: Literal["global", "layer"] = "global",
    round_to: int = 1,
    exclude: Sequence[str] = (),
    floor: float | None = None,
    calibration: Sequence[Call] | None = None,
) -> Pruning:
    """Remove channels from `model`, in place: planned, proved on a copy, then applied.

    Args:
        model: any network.
        inputs: one batch: a tensor, positional arguments, or recorded calls.
        budget: what may be left, in fractions of `model` or absolute.
        ratio: instead of a budget, the fraction of channels to cut (of all, or of each layer: see `ranking`).
        criterion: `l1`, `l2`, `fpgm`, `bn_scale` or `random`.
        ranking: `global` or `layer`.
        round_to: layers keep multiples of this.
        exclude: patterns of modules whose output channels stay.
        floor: smallest fraction of a layer that stays; by default 0.1 under a budget, 0 with a ratio.
        calibration: calls to refit the remaining weights on and to re-estimate BatchNorm with; None: no refit.

    Returns:
        What was done.

    Raises:
        BudgetError: the budget cannot be met; the network is as it was.
        ValueError: bad arguments, or a network in which nothing can be cut.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3))
        >>> pruning = prune_channels(net, torch.zeros(1, 1, 12, 12), Budget(macs=0.5))
        >>> before, after = pruning.costs["macs"]
        >>> pruning.proof, 0.48 < after / before <= 0.5
        ('exact', True)
    """
    from lightning_compress.methods.calibration import Refit

    least = (0.1 if ratio is None else 0.0) if floor is None else floor
    selection = Selection(criterion, ranking, round_to, tuple(exclude), least)
    limits = None
    if budget is not None:
        dense = costs(trace_coupling(model, inputs))
        unknown = set(budget.given()) - set(dense)
        if unknown:
            raise ValueError(f"prune_channels takes a budget of {', '.join(dense)}; got {', '.join(unknown)}")
        limits = budget.limits(dense)
    plan = plan_channels(model, as_calls(inputs), selection, limits=limits, ratio=ratio)
    before = costs(plan.coupling)
    if plan.settled is None:
        return Pruning((), "nothing cut", plan.coupling.reasons, {unit: (c, c) for unit, c in before.items()})
    after = costs(plan.coupling, plan.settled.cut)
    refit = None if calibration is None else Refit(model, plan.coupling, plan.settled.cut, calibration)
    apply_edits(model, [plan.settled.keep])
    if refit is not None:
        refit.apply()
    spent = {unit: (before[unit], after[unit]) for unit in before}
    return Pruning((plan.settled.keep,), plan.settled.proof.kind, plan.coupling.reasons, spent)


def _exclude(coupling: Coupling, patterns: Sequence[str]) -> None:
    names = [name for name, _ in coupling.model.named_modules()]
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(f"`exclude` pattern {pattern!r} matches no module; near names: {', '.join(near) or names[:5]}")
        inside = tuple(f"{module}." for module in matched if module)
        kept = [classes for (name, dim), classes in coupling.locations.items() if dim == 0 and name.startswith(inside)]
        coupling.freeze(kept, f"excluded by pattern {pattern!r}")


class _Chooser:
    """Turns scores into a choice: the worst channels first, within what each layer must keep."""

    def __init__(self, coupling: Coupling, selection: Selection, scores: Scores) -> None:
        self.coupling, self.selection = coupling, selection
        self.groups = [group for group in coupling.groups if not np.isnan(scores[group.classes]).any()]
        self.ranked = [group.classes[np.argsort(scores[group.classes], kind="stable")] for group in self.groups]
        self.least = [self._round(len(g.classes), max(1, int(np.ceil(len(g.classes) * selection.floor)))) for g in self.groups]
        cuttable = [r[: len(r) - least] for r, least in zip(self.ranked, self.least, strict=True)]
        everything = np.concatenate([*cuttable, np.empty(0, np.int64)])
        self.order = everything[np.argsort(scores[everything], kind="stable")]

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
        return self.mask([self._down(len(r), int((~cut[r]).sum()), m) for r, m in zip(self.ranked, self.least, strict=True)])

    def _down(self, size: int, keep: int, least: int) -> int:
        step = self.selection.round_to
        return size if keep == size else max(least, keep // step * step)

    def layerwise(self, amount: float) -> Mask:
        """Cut the fraction `amount` of each layer."""
        keep = [self._down(len(r), len(r) - int(len(r) * amount), m) for r, m in zip(self.ranked, self.least, strict=True)]
        return self.mask(keep)

    def by_ratio(self, ratio: float) -> Mask:
        """Cut a fraction of the channels."""
        if self.selection.ranking == "layer":
            return self.layerwise(ratio)
        return self.prefix(min(len(self.order), round(ratio * sum(map(len, self.ranked)))))

    def within(self, limits: Mapping[str, float]) -> Mask:
        """The smallest cut that meets the limits, then whatever can be given back under them."""

        def fits(cut: Mask) -> bool:
            return all(UNITS[unit](self.coupling, cut) <= limit for unit, limit in limits.items())

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
        return self._give_back(cut, fits) if self.selection.round_to == 1 else cut

    def _give_back(self, cut: Mask, fits: Callable[[Mask], bool], tries: int = 200) -> Mask:
        """Bring back the best of the cut channels, as long as the limits hold."""
        for channel in self.order[::-1][cut[self.order[::-1]]][:tries]:
            cut[channel] = False
            cut[channel] = not fits(cut)
        return cut

    def _refuse(self, limits: Mapping[str, float], smallest: Mask) -> None:
        dense, least = costs(self.coupling), costs(self.coupling, smallest)
        worst = max(limits, key=lambda unit: least[unit] / limits[unit])
        raise BudgetError(
            f"a budget of {limits[worst]:,.0f} {worst} cannot be met: this network has {dense[worst]:,.0f}, and the "
            f"lowest reachable by cutting channels is {least[worst]:,.0f} ({least[worst] / dense[worst]:.3f} of it), with "
            f"floor={self.selection.floor} and {len(self.groups)} layers that can be cut; ask for more, or lower `floor`"
        )


