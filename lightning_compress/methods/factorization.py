"""Low-rank factorization: layers of a trained network as chains of cheaper ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_compress.budget import Budget, require_budget
from lightning_compress.calls import Call, as_calls, explain_inputs
from lightning_compress.methods.approximation import Candidate, Form, Init
from lightning_compress.methods.forms import DECOMPOSITIONS
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.planning import Allocation, Planner, Replaced, replace_layers
from lightning_compress.methods.replaceable import Layer
from lightning_compress.methods.sequential import Planned
from lightning_compress.methods.vbmf import vbmf_rank
from lightning_compress.wording import require_choice

__all__ = ["ORIGIN", "Rank", "check_rank", "factorize", "low_rank_forms", "plan_ranks"]

ORIGIN = "low_rank"

Rank = str | int | Mapping[str, Any]


def low_rank_forms(decomposition: str, round_to: int = 1) -> list[Form]:
    """The decomposition by its name, and the one that takes the layers which have no kernel to decompose.

    Raises:
        ValueError: there is none of that name; `round_to` is below 1.
    """
    require_choice("decomposition", decomposition, DECOMPOSITIONS)
    return [replace(DECOMPOSITIONS[name], round_to=round_to) for name in (decomposition, "channel")]


def plan_ranks(planner: Planner, rank: Rank) -> list[Planned]:
    """A rank for each layer by a rule instead of a budget.

    Args:
        planner: the network's layers.
        rank: `energy:0.95` (the smallest that keeps this share of the outputs' energy), `vbmf`, one rank for all
            layers, or path -> rank for some.

    Raises:
        ValueError: no such rule, layer or rank.
    """
    if isinstance(rank, Mapping):
        unknown = [path for path in rank if path not in planner.candidates]
        if unknown:
            reason = planner.left.get(unknown[0], "there is no such layer")
            raise ValueError(f"`rank` of {unknown[0]!r}: {reason}; layers: {', '.join(list(planner.candidates)[:8])}")
    return planner.everything(_rule(rank))


def check_rank(rank: Rank) -> None:
    """Raise unless `rank` is a rule that `plan_ranks` knows.

    Raises:
        ValueError: what it should be.
    """
    _rule(rank)


def _rule(rank: Rank) -> Callable[[Layer, Sequence[Candidate]], Candidate | None]:
    kind, _, value = rank.partition(":") if isinstance(rank, str) else ("", "", "")
    if kind == "energy":
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise ValueError(f"`rank` by energy must be energy:X with X in (0, 1), got {rank!r}")
        return lambda _, candidates: next((c for c in reversed(candidates) if c.error <= 1 - share), None)
    if rank == "vbmf":
        return _by_vbmf
    if isinstance(rank, Mapping):
        wanted = rank
        return lambda layer, candidates: _given(layer, candidates, wanted.get(layer.path))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be energy:X, vbmf, an integer of at least 1 or path -> rank, got {rank!r}")
    return lambda layer, candidates: _given(layer, candidates, rank)


def _given(layer: Layer, candidates: Sequence[Candidate], rank: Any) -> Candidate | None:
    if rank is None:
        return None
    rank = tuple(rank) if isinstance(rank, list) else rank
    for candidate in candidates:
        if candidate.rank == rank:
            return candidate
    most = candidates[0].rank
    if isinstance(rank, int) and isinstance(most, int) and 1 <= rank <= most:
        return Candidate(rank, float("nan"))  # between those that were weighed
    if (
        isinstance(rank, tuple)
        and isinstance(most, tuple)
        and all(1 <= r <= m for r, m in zip(rank, most, strict=True))
    ):
        return Candidate(rank, float("nan"))
    raise ValueError(
        f"`rank` {rank!r} of layer {layer.path!r} is not possible: at most {most!r}; give it a rank of its own, or "
        "leave it out by `exclude`"
    )


def _by_vbmf(layer: Layer, candidates: Sequence[Candidate]) -> Candidate | None:
    """The rank that variational Bayes sees in the weight, unfolded as the form unfolds it."""
    ranks = vbmf_rank(layer.weight, candidates[0].rank)
    if isinstance(ranks, int):
        return min(candidates, key=lambda c: (abs(c.rank - ranks), -c.rank))
    return Candidate(ranks, float("nan"))


@explain_inputs
def factorize(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    budget: Budget | None = None,
    *,
    decomposition: str = "spatial",
    rank: Rank | None = None,
    round_to: int = 8,
    allocation: Allocation = "greedy",
    init: Init = "data",
    calibration: Sequence[Call] | None = None,
    exclude: Sequence[str] = (),
) -> Replaced:
    """Factorize the layers of `model`, in place, to low rank.

    With `init="data"` nothing is found from the weights alone: ranks are chosen by the error of the outputs on
    calibration data, and each layer is fitted on what the factorized layers before it give.

    Args:
        model: any network.
        inputs: one batch: a tensor, positional arguments, or recorded calls.
        budget: what may be left, in fractions of `model` or absolute, over all layers at once. Either this or `rank`.
        decomposition: `spatial` (k x 1 and 1 x k), `channel` (fewer channels and back), `tucker` or `cp`; linear layers
            and pointwise convolutions always by `channel`, for them the singular value decomposition.
        rank: instead of a budget, a rule for each layer: `energy:0.95`, `vbmf`, one rank, or path -> rank.
        round_to: ranks above this are multiples of it, unless `rank` gives them: other widths are slow.
        allocation: how a budget is shared out: `greedy` (least error for what is saved), `uniform`.
        init: `data`, `weights` (as other tools do) or `random`.
        calibration: a few hundred unlabelled inputs, as calls; by default `inputs`.
        exclude: patterns of layers that stay.

    Returns:
        What was done, and why the other layers were left.

    Raises:
        BudgetError: the budget cannot be met; the network is as it was.
        ValueError: bad arguments, data that is not finite, or a network in which nothing can be factorized.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4))
        >>> _ = net(torch.zeros(1, 3, 8, 8))
        >>> done = factorize(net, torch.randn(32, 3, 8, 8), Budget(macs=0.5))
        >>> before, after = done.costs["macs"]
        >>> 0.45 < after / before <= 0.5, net[2].form
        (True, 'spatial')
    """
    if (budget is None) == (rank is None):
        came = "neither" if rank is None else "both"
        raise ValueError(f"give either a budget, e.g. Budget(macs=0.5), or a rank, e.g. 'energy:0.95', got {came}")
    if budget is not None:
        require_budget(budget)
    forms = low_rank_forms(decomposition, round_to)
    calls = as_calls(inputs)
    data = calls if calibration is None and init == "data" else tuple(calibration or ())
    planner = Planner(model, calls, forms, data if init == "data" else (), exclude)
    planner.require()
    if budget is None:
        assert rank is not None
        planned = plan_ranks(planner, rank)
    else:
        stopwatch = None if budget.latency is None else Stopwatch.start(model, calls)
        clock = {} if stopwatch is None else {"latency": stopwatch.microseconds}
        planned = planner.within(budget.limits({**planner.dense, **clock}), allocation, stopwatch)
    return replace_layers(model, planner, planned, data, init, ORIGIN)
