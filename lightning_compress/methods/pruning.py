"""Channel pruning: which channels go, under a budget, and the edit that removes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.budget import Budget, as_fraction, require_budget
from lightning_compress.calls import Call, as_calls, explain_inputs
from lightning_compress.coupling import Coupling, Location, Mask, Settled, settle, trace_coupling
from lightning_compress.edits import Edit, apply_edits, named_tensors
from lightning_compress.methods.choosing import Chooser, Ranking, Selection, costs
from lightning_compress.methods.criteria import activation_terms, score_channels
from lightning_compress.methods.measured import Stopwatch, within_bytes, within_latency
from lightning_compress.methods.refit import Refit
from lightning_compress.methods.sensitivity import measure_sensitivity, weigh
from lightning_compress.wording import near_names

__all__ = ["Pruning", "freeze_kept", "plan_channels", "prune_channels"]


@dataclass(frozen=True)
class Pruning:
    """What `prune_channels` did.

    Attributes:
        edits: the edits that were applied; none when nothing could be cut.
        proof: `exact`, `restricted` (norms over channels run over the survivors) or `nothing cut`.
        frozen: location -> why (some of) its channels stay.
        costs: unit -> (before, after); macs, params and bytes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruning = prune_channels(net, torch.zeros(1, 4), ratio=0.5)
        >>> pruning.costs["macs"], pruning.frozen["2.weight[0]"]
        ((48.0, 24.0), "reaches the network's output")
    """

    edits: tuple[Edit, ...]
    proof: str
    frozen: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def plan_channels(
    coupling: Coupling,
    selection: Selection,
    *,
    limits: Mapping[str, float] | None = None,
    ratio: float | None = None,
    saliency: Mapping[Location, Tensor] | None = None,
    stopwatch: Stopwatch | None = None,
    keep: Mapping[str, str] | None = None,
    seed: int = 0,
    first: Mask | None = None,
    calibration: Sequence[Call] | None = None,
) -> Settled | None:
    """Plan and prove, without touching the network.

    Args:
        coupling: the traced network; what the proof finds uncuttable is frozen in it.
        selection: how channels are chosen.
        limits: unit -> absolute cost allowed (see `costs`). Either this or `ratio`.
        ratio: fraction of the channels to cut.
        saliency: gathered terms for the criteria that need them.
        stopwatch: what a limit on latency is measured with.
        keep: tensor name -> why none of its channels may go.
        seed: for the criteria that draw.
        first: classes that go before all others.
        calibration: what sensitivity is measured on, if `selection` asks for it.

    Returns:
        The proved edit; None when there is nothing to cut.

    Raises:
        BudgetError: the limits cannot be met, with the lowest that can.
        ValueError: no channel can be cut at all; a pattern that matches nothing; scores that are not finite.
    """
    if (limits is None) == (ratio is None):
        raise ValueError(
            f"give either a budget, e.g. Budget(macs=0.5), or a ratio, got {'neither' if ratio is None else 'both'}"
        )
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"`ratio` must be a fraction of the channels in (0, 1), got {ratio!r}{as_fraction(ratio)}")
    model = coupling.model
    freeze_kept(coupling, selection.exclude, keep)
    if not coupling.groups:
        why = "; ".join(sorted(set(coupling.reasons.values()))[:5])
        if len(coupling.calls) > 1 and all(call.path for call in coupling.calls):
            why += "; its parts are called one by one, so that channels cannot be followed: call the network as a whole"
        raise ValueError(f"there is no channel in this network that could be cut: {why or 'it has no layers'}")
    scores = score_channels(coupling, selection.criterion, saliency, seed)
    if selection.sensitivity:
        measured = measure_sensitivity(coupling, scores, calibration or coupling.calls)
        scores = weigh(coupling, scores, measured, selection.sensitivity)
    if first is not None:
        scores[first] -= np.nanmax(scores) - np.nanmin(scores) + 1.0

    def propose(targets: Mapping[str, float] | None) -> Settled | None:
        def choose(current: Coupling) -> Mask:
            chooser = Chooser(current, selection, scores)
            return chooser.by_ratio(ratio or 0.0) if targets is None else chooser.within(targets)

        return settle(coupling, choose, "channel_pruning")

    def propose_bytes(targets: Mapping[str, float]) -> Settled | None:
        return within_bytes(model, coupling, propose, targets) if "bytes" in targets else propose(targets)

    if limits is None:
        return propose(None)
    if "latency" not in limits:
        return propose_bytes(limits)
    if stopwatch is None:
        raise ValueError("a limit on latency needs a stopwatch")
    least = coupling.macs(Chooser(coupling, selection, scores).smallest())
    return within_latency(model, coupling, propose_bytes, limits, stopwatch, least)


@explain_inputs
def prune_channels(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    budget: Budget | None = None,
    *,
    ratio: float | None = None,
    criterion: str = "l2",
    ranking: Ranking = "global",
    round_to: int = 1,
    exclude: Sequence[str] = (),
    floor: float | None = None,
    sensitivity: float = 0.0,
    calibration: Sequence[Call] | None = None,
) -> Pruning:
    """Remove channels from `model`, in place: planned, proved on a copy, then applied.

    Args:
        model: any network.
        inputs: one batch: a tensor (batch first), positional arguments, or recorded calls.
        budget: what may be left, in fractions of `model` or absolute.
        ratio: instead of a budget, the fraction of channels to cut (of all, or of each layer: see `ranking`).
        criterion: `l1`, `l2`, `fpgm`, `bn_scale`, `activation`, `lamp` or `random`.
        ranking: `global`, `layer` or `isomorphic`, see `Selection`.
        round_to: layers keep multiples of this.
        exclude: patterns of modules whose output channels stay.
        floor: smallest fraction of a layer that stays; by default 0.1 under a budget, 0 with a ratio.
        sensitivity: power of each layer's sensitivity that its scores are multiplied by; measured on `calibration`, or
            else on `inputs`, by one run on at most 64 samples for each layer (see `measure_sensitivity`).
        calibration: calls to refit the remaining weights on and to re-estimate BatchNorm with; None: no refit.

    Returns:
        What was done.

    Raises:
        BudgetError: the budget cannot be met; the network is as it was.
        ValueError: bad arguments, or a network in which nothing can be cut.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3))
        >>> pruning = prune_channels(net, torch.zeros(1, 1, 12, 12), Budget(macs=0.5))
        >>> before, after = pruning.costs["macs"]
        >>> pruning.proof, 0.48 < after / before <= 0.5
        ('exact', True)
    """
    if budget is not None:
        require_budget(budget)
        budget.refuse("bit_operations")
    least = (Selection.floor if ratio is None else 0.0) if floor is None else floor
    selection = Selection(criterion, ranking, round_to, tuple(exclude), least, sensitivity)
    calls = as_calls(inputs)
    coupling = trace_coupling(model, calls)
    before = costs(coupling)
    stopwatch = Stopwatch.start(model, calls) if budget is not None and budget.latency is not None else None
    clock = {} if stopwatch is None else {"latency": stopwatch.microseconds}
    limits = None if budget is None else budget.limits(before | clock)
    saliency = activation_terms(coupling, calibration or calls) if criterion == "activation" else None
    settled = plan_channels(
        coupling,
        selection,
        limits=limits,
        ratio=ratio,
        saliency=saliency,
        stopwatch=stopwatch,
        calibration=calibration or calls,
    )
    if settled is None:
        return Pruning((), "nothing cut", coupling.reasons, {unit: (c, c) for unit, c in before.items()})
    after = costs(coupling, settled.cut)
    refit = None if calibration is None else Refit(model, coupling, settled.cut, calibration)
    apply_edits(model, [settled.keep])
    if refit is not None:
        refit.apply()
    spent = {unit: (before[unit], after[unit]) for unit in before}
    return Pruning((settled.keep,), settled.proof.kind, coupling.reasons, spent)


def freeze_kept(coupling: Coupling, patterns: Sequence[str], keep: Mapping[str, str] | None = None) -> None:
    """Freeze the channels that were asked to stay.

    Args:
        coupling: the traced network.
        patterns: of modules whose output channels stay.
        keep: tensor name -> why none of its channels may go.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    _exclude(coupling, patterns)
    for tensor, reason in (keep or {}).items():
        coupling.freeze([classes for (name, _), classes in coupling.locations.items() if name == tensor], reason)


def _exclude(coupling: Coupling, patterns: Sequence[str]) -> None:
    modules = dict(coupling.model.named_modules())
    sizes = {name: tensor.dim() for name, tensor in named_tensors(coupling.model)}
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        if not matched:
            near = near_names(pattern, list(modules))
            raise ValueError(f"`exclude` pattern {pattern!r} matches no module; near names: {near}")
        inside = tuple(f"{module}." for module in matched if module)
        kept = []
        for (name, dim), classes in coupling.locations.items():
            transposed = getattr(modules.get(name.rpartition(".")[0]), "transposed", False) and sizes[name] > 1
            if dim == int(transposed) and name.startswith(inside):
                kept.append(classes)
        coupling.freeze(kept, f"excluded by pattern {pattern!r}")
