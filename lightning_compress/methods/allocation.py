"""One budget for all layers: where is how much taken, so that the least is lost."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.budget import BudgetError, bisect, meant_as_share

__all__ = ["Option", "allocate", "share_out"]

Costs = Mapping[str, float]
"""Unit -> cost."""


@dataclass(frozen=True)
class Option:
    """One thing that a layer may become.

    Attributes:
        choice: whatever tells it apart; None: it stays as it is.
        error: what is lost, in units that can be added over layers.
        costs: unit -> cost.
    """

    choice: Any
    error: float
    costs: Costs


def allocate(options: Sequence[Sequence[Option]], rest: Costs, limits: Costs) -> list[Option]:
    """One option for each layer, within limits on the sums of their costs, with little error in all.

    Layers go down their lower convex hulls of error over cost, always the step that loses least for what it saves (the
    greedy solution of the relaxed problem, optimal but for the last step); what is left of the limits is given back.

    Args:
        options: for each layer, what it may become; the first is that it stays.
        rest: unit -> what everything else costs.
        limits: unit -> cost allowed in all.

    Returns:
        The options, in the order of the layers.

    Raises:
        BudgetError: the limits cannot be met, with the lowest that can.

    Example:
        >>> def layer(*pairs):
        ...     return [Option(error or None, error, {"macs": macs}) for macs, error in pairs]
        >>> chosen = allocate([layer((10, 0), (5, 0.1)), layer((10, 0), (5, 0.3))], {"macs": 5}, {"macs": 20})
        >>> [option.choice for option in chosen]
        [0.1, None]
    """
    units = list(limits)
    dense = {unit: rest[unit] + sum(layer[0].costs[unit] for layer in options) for unit in units}
    weight = {unit: max(dense[unit] - limits[unit], 0.0) / max(dense[unit], 1e-300) ** 2 for unit in units}
    if not any(weight.values()):
        return [layer[0] for layer in options]

    def scalar(costs: Costs) -> float:
        """The units by how far each is from its limit, in fractions of the dense network."""
        return sum(weight[unit] * costs[unit] for unit in units)

    used = dict(dense)
    chosen = [layer[0] for layer in options]
    hulls = [_hull(layer, scalar) for layer in options]
    queue = [(_slope(hull[0], hull[1], scalar), place, 1) for place, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue and not _fits(used, limits):
        _, place, step = heapq.heappop(queue)
        hull = hulls[place]
        _move(used, chosen[place], hull[step])
        chosen[place] = hull[step]
        if step + 1 < len(hull):
            heapq.heappush(queue, (_slope(hull[step], hull[step + 1], scalar), place, step + 1))
    if not _fits(used, limits):
        _force(options, chosen, used, limits)
    _give_back(options, chosen, used, limits)
    return chosen


def share_out(options: Sequence[Sequence[Option]], rest: Costs, limits: Costs) -> list[Option]:
    """The same fraction of its cost for every layer, as tools do that know one ratio; errors play no part.

    Args:
        options: as for `allocate`; so are the rest.
        rest: likewise.
        limits: likewise.
    """

    def at(thousandth: int) -> list[Option]:
        chosen = []
        for layer in options:
            allowed = {unit: (1 - thousandth / 1000) * cost for unit, cost in layer[0].costs.items() if unit in limits}
            fitting = [option for option in layer if all(option.costs[unit] <= allowed[unit] for unit in allowed)]
            smallest = min(layer, key=lambda option: sum(option.costs[unit] for unit in allowed))
            chosen.append(
                max(fitting, key=lambda option: sum(option.costs[u] for u in allowed)) if fitting else smallest
            )
        return chosen

    def fits(thousandth: int) -> bool:
        return _fits(_total(at(thousandth), rest, limits), limits)

    found = bisect(fits, 0, 1000)
    if found is None:
        raise _refusal(options, rest, limits)
    return at(found)


def _hull(options: Sequence[Option], scalar: Any) -> list[Option]:
    """The lower convex hull of error over cost, from the option that stays, which loses nothing, downwards."""
    ordered = sorted(options[1:], key=lambda option: (-scalar(option.costs), option.error))
    hull = [options[0]]
    for option in ordered:
        if scalar(option.costs) >= scalar(hull[0].costs):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], scalar) >= _slope(hull[-2], option, scalar):
            hull.pop()
        if scalar(option.costs) < scalar(hull[-1].costs):
            hull.append(option)
    return hull


def _sum(option: Option, units: Sequence[str]) -> float:
    return sum(option.costs[unit] for unit in units)


def _slope(before: Option, after: Option, scalar: Any) -> float:
    saved = scalar(before.costs) - scalar(after.costs)
    return (after.error - before.error) / saved if saved > 0 else float("inf")


def _force(options: Sequence[Sequence[Option]], chosen: list[Option], used: dict[str, float], limits: Costs) -> None:
    """The hulls did not get there: take the cheapest of each layer in the unit that is still over its limit."""
    rest = {unit: used[unit] - sum(option.costs[unit] for option in chosen) for unit in limits}
    for unit in limits:
        for place, layer in enumerate(options):
            cheapest = min(layer, key=lambda option: option.costs[unit])
            if used[unit] > limits[unit] and cheapest.costs[unit] < chosen[place].costs[unit]:
                _move(used, chosen[place], cheapest)
                chosen[place] = cheapest
    if not _fits(used, limits):
        raise _refusal(options, rest, limits)


def _give_back(
    options: Sequence[Sequence[Option]], chosen: list[Option], used: dict[str, float], limits: Costs
) -> None:
    """Spend what is left of the limits on the largest gains, until nothing fits."""
    while True:
        best, gain = None, 0.0
        for place, layer in enumerate(options):
            now = chosen[place]
            for option in layer:
                if now.error - option.error > gain and all(
                    used[unit] + option.costs[unit] - now.costs[unit] <= limits[unit] for unit in limits
                ):
                    best, gain = (place, option), now.error - option.error
        if best is None:
            return
        place, option = best
        _move(used, chosen[place], option)
        chosen[place] = option


def _move(used: dict[str, float], before: Option, after: Option) -> None:
    for unit in used:
        used[unit] += after.costs[unit] - before.costs[unit]


def _total(chosen: Sequence[Option], rest: Costs, limits: Costs) -> dict[str, float]:
    return {unit: rest[unit] + sum(option.costs[unit] for option in chosen) for unit in limits}


def _fits(used: Costs, limits: Costs) -> bool:
    return all(used[unit] <= limits[unit] * (1 + 1e-12) for unit in limits)


def _refusal(options: Sequence[Sequence[Option]], rest: Costs, limits: Costs) -> BudgetError:
    def lowest(unit: str) -> float:
        return rest[unit] + sum(min(option.costs[unit] for option in layer) for layer in options)

    def dense(unit: str) -> float:
        return rest[unit] + sum(layer[0].costs[unit] for layer in options)

    worst = max(limits, key=lambda unit: (lowest(unit) - limits[unit]) / max(dense(unit), 1e-300))
    can = sum(len(layer) > 1 for layer in options)
    return BudgetError(
        f"a budget of {limits[worst]:,.0f} {worst} cannot be met: this network has {dense(worst):,.0f}, and the lowest "
        f"reachable by replacing layers is {lowest(worst):,.0f} ({lowest(worst) / max(dense(worst), 1e-300):.3f} of "
        f"it), with {can} layers that can be made cheaper; ask for more, or combine with another method"
        f"{meant_as_share(worst, limits[worst])}"
    )
