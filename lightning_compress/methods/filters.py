"""Compact filters: layers of a trained network as those of compact architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.budget import Budget, require_budget
from lightning_compress.calls import Call, as_calls, explain_inputs
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.forms import COMPACT
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.planning import Planner, Replaced, replace_layers
from lightning_compress.wording import did_you_mean, require_choice

__all__ = ["ORIGIN", "compact_filters", "compact_form"]

ORIGIN = "compact_filters"


def compact_form(operator: str, **options: Any) -> Form:
    """What layers are to become, by name.

    Args:
        operator: `depthwise_separable`, `ghost`, `fire`, `grouped_shuffle`, `crelu`, `rotated`, `circulant` or
            `hashed`.
        options: of that form: `rank`, `ratio`, `kernel`, `squeeze`, `small`, `groups`, `block`, `seed`.

    Raises:
        ValueError: no such operator, or an option that it does not have or that is out of range.

    Example:
        >>> compact_form("ghost", ratio=4).ratio
        4
        >>> compact_form("ghost", rank=4)
        Traceback (most recent call last):
        ValueError: operator 'ghost' has no option `rank`; it has kernel, ratio
    """
    require_choice("operator", operator, COMPACT)
    kind = COMPACT[operator]
    known = sorted(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"operator {operator!r} has no option `{name}`; {has}{did_you_mean(name, known)}")
    return kind(**options)


@explain_inputs
def compact_filters(
    model: nn.Module,
    inputs: Tensor | Call | Sequence[Any],
    operator: str = "depthwise_separable",
    budget: Budget | None = None,
    *,
    init: Init = "data",
    calibration: Sequence[Call] | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> Replaced:
    """Replace layers of `model`, in place, by compact ones made from the trained weights and data.

    Args:
        model: any network.
        inputs: one batch: a tensor, positional arguments, or recorded calls.
        operator: what layers become, see `compact_form`.
        budget: replace no more layers than this needs, those first that lose least for what they save; None: all that
            get cheaper.
        init: `data`, `weights` or `random`.
        calibration: a few hundred unlabelled inputs, as calls; by default `inputs`.
        exclude: patterns of layers that stay.
        options: of the operator.

    Returns:
        What was done, and why the other layers were left.

    Raises:
        BudgetError: the budget cannot be met; the network is as it was.
        ValueError: bad arguments, data that is not finite, or a network in which nothing can be replaced.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> done = compact_filters(net, torch.randn(32, 3, 8, 8), "depthwise_separable", rank=1)
        >>> [layer.groups for layer in net[2]]
        [16, 1]
    """
    form = compact_form(operator, **options)
    if budget is not None:
        require_budget(budget)
    calls = as_calls(inputs)
    data = calls if calibration is None and init == "data" else tuple(calibration or ())
    planner = Planner(model, calls, [form], data if init == "data" else (), exclude)
    planner.require()
    if budget is None:
        planned = planner.everything(lambda _, candidates: candidates[0])
    else:
        stopwatch = None if budget.latency is None else Stopwatch.start(model, calls)
        clock = {} if stopwatch is None else {"latency": stopwatch.microseconds}
        planned = planner.within(budget.limits({**planner.dense, **clock}), stopwatch=stopwatch)
    return replace_layers(model, planner, planned, data, init, ORIGIN)
