"""Planning: what each layer may become, what that costs and loses, and which of it a budget takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import BudgetError, meant_as_share
from lightning_compress.calls import Call
from lightning_compress.edits import Edit, Replace, Spec, apply_edits, renew, skeleton
from lightning_compress.footprint import measure
from lightning_compress.methods.allocation import Option, allocate, share_out
from lightning_compress.methods.approximation import Candidate, Form, Init
from lightning_compress.methods.calibration import visit
from lightning_compress.methods.forms import DECOMPOSITIONS
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.moments import Moments
from lightning_compress.methods.pricing import price
from lightning_compress.methods.replaceable import Layer, find_layers
from lightning_compress.methods.sequential import Planned, fit, replacement
from lightning_compress.methods.timing import time_candidates
from lightning_compress.quiet import without_observers
from lightning_compress.waiting import following
from lightning_compress.wording import near_names, require_choice

__all__ = ["Allocation", "Planner", "Replaced", "replace_layers"]

Allocation = Literal["greedy", "uniform"]
"""All layers compete by what they lose for what they save, or each gives the same fraction."""

MEMORY = 1 << 24
"""Bytes of moments that are kept at once; layers whose moments do not fit together take another run of the network."""

TENSOR_ENTRY = 250
"""Bytes, roughly, that the names and shapes of a replaced layer's tensors take in a file."""

PROBES = 5
"""Steps of the search for the plan that just meets a limit which is measured on the whole network."""


@dataclass(frozen=True)
class Replaced:
    """What replacing layers did.

    Attributes:
        edits: the edits that were applied; none when nothing was replaced.
        errors: path -> output error that is left, relative to the energy of the layer's outputs on calibration data.
        left: path -> why the layer was left alone.
        costs: unit -> (before, after).
        ranks: path -> size that the layer's new form has.

    Example:
        >>> import torch
        >>> from lightning_compress import factorize
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> replaced = factorize(net, torch.randn(64, 16), rank={"0": 4})
        >>> replaced.ranks, list(replaced.left)
        ({'0': 4}, ['2'])
    """

    edits: tuple[Edit, ...]
    errors: Mapping[str, float]
    left: Mapping[str, str]
    costs: Mapping[str, tuple[float, float]]
    ranks: Mapping[str, Any] = field(default_factory=dict)


class Planner:
    """The options of all layers of a network.

    Args:
        model: the network; it is not changed.
        calls: how it is called, once.
        forms: what layers may become; each takes the first that does not refuse it.
        calibration: data for the errors that are predicted; none: they are those of the weights.
        exclude: patterns of layers that stay.
        keep: parameter name -> why its layer stays.

    Raises:
        ValueError: a pattern that matches no layer; data that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        forms: Sequence[Form],
        calibration: Sequence[Call] = (),
        exclude: Sequence[str] = (),
        keep: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.calls = model, calls
        self.layers = find_layers(model, calls, {**DECOMPOSITIONS, **{form.name: form for form in forms}})
        self.left = dict(self.layers.left)
        self.dense = self._costs()
        self.forms: dict[str, Form] = {}
        outside = {name.rpartition(".")[0]: reason for name, reason in (keep or {}).items()}
        excluded = self._excluded(exclude)
        for layer in self.layers.found:
            reasons = [form.refuses(layer.geometry) for form in forms]
            if layer.path in outside or layer.path in excluded:
                self.left[layer.path] = outside.get(layer.path) or excluded[layer.path]
            elif all(reasons):
                self.left[layer.path] = str(reasons[0])
            else:
                self.forms[layer.path] = forms[reasons.index(None)]
        self.candidates = self._candidates(calibration)

    def require(self) -> None:
        """Raise if no layer can be replaced.

        Raises:
            ValueError: with the reasons.
        """
        if not self.forms:
            why = "; ".join(f"{path} {reason}" for path, reason in list(self.left.items())[:5])
            raise ValueError(f"there is no layer in this network that could be replaced: {why or 'it has none'}")

    @property
    def replaceable(self) -> list[Layer]:
        """The layers with candidates, in the order that data reaches them."""
        return [layer for layer in self.layers.found if layer.path in self.forms]

    # Which sizes.

    def within(
        self, limits: Mapping[str, float], allocation: Allocation = "greedy", stopwatch: Stopwatch | None = None
    ) -> list[Planned]:
        """A plan within limits.

        Args:
            limits: unit -> cost allowed; `latency` in microseconds of the stopwatch.
            allocation: how it is shared out.
            stopwatch: what a limit on latency is measured with.

        Raises:
            BudgetError: the limits cannot be met, with the lowest that can.
            ValueError: an unknown allocation; a limit on latency without a stopwatch.
        """
        require_choice("allocation", allocation, get_args(Allocation))
        timed = {}
        if "latency" in limits:
            if stopwatch is None:
                raise ValueError("a limit on latency needs a stopwatch")
            timed = time_candidates(self.model, self.replaceable, self.forms, self.candidates)
        options = [self._options(layer, timed.get(layer.path)) for layer in self.replaceable]
        if "macs" in limits:
            self._refuse_macs(limits["macs"], options)
        dense = {**self.dense, "latency": 0.0 if stopwatch is None else stopwatch(self._copy())}
        rest = {unit: dense[unit] - sum(layer[0].costs[unit] for layer in options) for unit in limits}
        solve = allocate if allocation == "greedy" else share_out
        measured = [unit for unit in ("bytes", "latency") if unit in limits]
        lowest = {u: rest[u] + sum(min(o.costs[u] for o in layer) for layer in options) for u in measured}

        def attempt(strictness: float) -> tuple[list[Planned], dict[str, float]]:
            """The plan for limits on the way to the lowest that there is, and how far it is over the real ones."""
            strict = {u: max(limits[u] - strictness * (limits[u] - lowest[u]), lowest[u]) for u in measured}
            planned = self._planned(solve(options, rest, {**limits, **strict}))
            return planned, self._excess(planned, limits, stopwatch)

        planned, over = attempt(0.0)
        if not over:
            return planned
        best, over = attempt(1.0)
        if over:
            unit = max(over, key=lambda unit: over[unit] / limits[unit])
            least = limits[unit] + over[unit]
            raise BudgetError(
                f"a budget of {limits[unit]:,.0f} {unit} cannot be met: this network has {dense[unit]:,.0f}, and the "
                f"lowest reachable by replacing layers is {least:,.0f} ({least / dense[unit]:.3f} of it), as measured; "
                f"ask for more, or combine with another method{meant_as_share(unit, limits[unit])}"
            )
        low, high = 0.0, 1.0
        for _ in range(PROBES):
            middle = (low + high) / 2
            planned, over = attempt(middle)
            low, high, best = (middle, high, best) if over else (low, middle, planned)
        return best

    def everything(self, choose: Callable[[Layer, Sequence[Candidate]], Candidate | None]) -> list[Planned]:
        """A plan by a rule for each layer; None, or what is not cheaper in parameters and arithmetic, leaves it."""
        planned = []
        for layer in self.replaceable:
            candidate = choose(layer, self.candidates[layer.path])
            if candidate is not None:
                item = Planned(layer, self.forms[layer.path], candidate.rank)
                before, after = price(layer.spec, layer.places), price(item.spec, layer.places)
                if after.macs <= before.macs and after.params <= before.params and after != before:
                    planned.append(item)
        return planned

    @staticmethod
    def computes_less(planned: Sequence[Planned]) -> bool:
        """Whether a plan has fewer multiply-accumulates, or only fewer weights."""
        return any(
            price(item.spec, item.layer.places).macs < price(item.layer.spec, item.layer.places).macs
            for item in planned
        )

    def recover(self, edit: Replace) -> list[Planned]:
        """The plan that an edit of the same network carries out.

        Raises:
            ValueError: a layer becomes what is none of its candidates.
        """
        planned = []
        for path, (_, after) in edit.layers.items():
            layer, form = next(item for item in self.replaceable if item.path == path), self.forms[path]
            fitting = [c for c in self.candidates[path] if form.spec(layer.geometry, c.rank) == after]
            if not fitting:
                raise ValueError(f"{path!r} cannot become what the plan says: is this the network it was made for?")
            planned.append(Planned(layer, form, fitting[0].rank))
        return planned

    def result(self, planned: Sequence[Planned], edits: Sequence[Edit], errors: Mapping[str, float]) -> Replaced:
        """What a plan that was carried out came to."""
        paths = {item.layer.path for item in planned}
        left = {**self.left, **{p: "would not get cheaper, or is not needed" for p in self.forms if p not in paths}}
        after = self._costs()
        costs = {unit: (before, after[unit]) for unit, before in self.dense.items()}
        return Replaced(tuple(edits), errors, left, costs, {item.layer.path: item.rank for item in planned})

    # What there is to choose from.

    def _excluded(self, patterns: Sequence[str]) -> dict[str, str]:
        modules = [name for name, _ in self.model.named_modules() if name]
        excluded: dict[str, str] = {}
        for pattern in patterns:
            matched = [name for name in modules if fnmatchcase(name, pattern)]
            if not matched:
                near = near_names(pattern, modules)
                raise ValueError(f"`exclude` pattern {pattern!r} matches no module; near names: {near}")
            for layer in self.layers.found:
                if any(layer.path == name or layer.path.startswith(f"{name}.") for name in matched):
                    excluded[layer.path] = f"excluded by pattern {pattern!r}"
        return excluded

    def _candidates(self, calibration: Sequence[Call]) -> dict[str, list[Candidate]]:
        """Path -> candidates, by as few runs of the network as memory allows."""
        found: dict[str, list[Candidate]] = {}
        batches: list[dict[str, Moments]] = [{}]
        for layer in self.replaceable:
            if not calibration or not layer.informed:
                found[layer.path] = self._weigh(layer, None)
                continue
            moments = Moments(layer.geometry, cross=False)
            if batches[-1] and moments.bytes + sum(other.bytes for other in batches[-1].values()) > MEMORY:
                batches.append({})
            batches[-1][layer.path] = moments
        for batch in following(filter(None, batches), "calibrating: finding the ranks that layers can have"):

            def see(path: str, x: Tensor, y: Tensor, kept: dict[str, Moments] = batch) -> None:
                kept[path].add(x, y)

            visit(self.model, self.layers, list(batch), calibration, see)
            for layer in self.replaceable:
                if layer.path in batch:
                    found[layer.path] = self._weigh(layer, batch.pop(layer.path))
        return found

    def _weigh(self, layer: Layer, moments: Moments | None) -> list[Candidate]:
        if moments is None:
            return self.forms[layer.path].candidates(layer.geometry, layer.weight, None)
        weight = layer.scaled.weight
        try:
            second = moments.objective(layer.centred, weight.flatten(2)).second
        except ValueError as error:
            raise ValueError(f"{layer.path}: {error}") from error
        return self.forms[layer.path].candidates(layer.geometry, weight, second)

    def _options(self, layer: Layer, timed: Mapping[Any, float] | None) -> list[Option]:
        """Staying as it is, and the candidates; with times, only those that were timed."""

        def option(choice: Planned | None, error: float, spec: Spec, rank: Any) -> Option:
            cost = price(spec, layer.places)
            edited = 0 if choice is None else len(json.dumps([layer.spec, spec])) + TENSOR_ENTRY
            costs = {"macs": cost.macs, "params": float(cost.params), "bytes": 4.0 * cost.params + edited}
            return Option(choice, error, {**costs, "latency": timed[rank] if timed else 0.0})

        found = [option(None, 0.0, layer.spec, None)]
        for candidate in self.candidates[layer.path]:
            if timed is None or candidate.rank in timed:
                item = Planned(layer, self.forms[layer.path], candidate.rank)
                found.append(option(item, candidate.error, item.spec, candidate.rank))
        return found

    def _refuse_macs(self, limit: float, options: Sequence[Sequence[Option]]) -> None:
        """Raise if the new layers only have fewer weights."""
        dense = self.dense["macs"]
        if limit < dense and not any(o.costs["macs"] < layer[0].costs["macs"] for layer in options for o in layer):
            raise BudgetError(
                f"a budget of {limit:,.0f} macs cannot be met: this network has {dense:,.0f}, and the lowest reachable "
                f"by replacing layers is {dense:,.0f}, as the new layers have fewer weights but compute as much; give "
                "a budget of params or bytes, or another method"
            )

    @staticmethod
    def _planned(chosen: Sequence[Option]) -> list[Planned]:
        return [option.choice for option in chosen if option.choice is not None]

    # What only a measurement tells.

    def _excess(
        self, planned: Sequence[Planned], limits: Mapping[str, float], stopwatch: Stopwatch | None
    ) -> dict[str, float]:
        """How far the network of a plan is over the limits that are measured on the whole of it."""
        over: dict[str, float] = {}
        if not {"bytes", "latency"} & set(limits):
            return over
        trial = self._copy()
        if planned:
            apply_edits(trial, [replacement(planned, "")])
            _fill(trial, [item.layer.path for item in planned])
        if "bytes" in limits:
            over["bytes"] = artifact_bytes(trial) - limits["bytes"]
        if "latency" in limits and stopwatch is not None:
            over["latency"] = stopwatch(trial) - limits["latency"]
        return {unit: excess for unit, excess in over.items() if excess > 0}

    def _costs(self) -> dict[str, float]:
        footprint = measure(self.model, self.calls)
        return {unit: float(getattr(footprint, unit)) for unit in ("macs", "params", "bytes")}

    def _copy(self) -> nn.Module:
        with without_observers(self.model):
            return skeleton(self.model, lambda tensor: tensor)


def _fill(trial: nn.Module, paths: Sequence[str]) -> None:
    """Give layers that are zero other weights: zeros would be coded as nothing."""
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        renew(trial.get_submodule(path), lambda old: torch.rand(old.shape, generator=generator).to(old))


def replace_layers(
    model: nn.Module, planner: Planner, planned: Sequence[Planned], data: Sequence[Call], init: Init, origin: str
) -> Replaced:
    """Carry a plan out on the network that it was made for.

    Args:
        model: the network.
        planner: the planner.
        planned: its plan.
        data: calibration data.
        init: where the new weights come from.
        origin: of the edit.
    """
    if not planned:
        return planner.result((), (), {})
    fitted = fit(model, planner.layers, planned, data, init, origin)
    apply_edits(model, [fitted.edit])
    fitted.apply(model)
    return planner.result(planned, (fitted.edit,), fitted.errors)
