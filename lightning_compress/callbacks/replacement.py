"""What the callbacks that replace layers have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_compress.budget import Budget, require_budget
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.edits import Edit, Replace, history
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.planning import Planner
from lightning_compress.methods.sequential import Fit, Planned, fit, replacement
from lightning_compress.wording import require_choice

__all__ = ["LayerReplacement"]


class LayerReplacement(CompressionCallback):
    """Base of the callbacks that put other layers in the place of some.

    Args:
        budget: what may be left; None: the method says by itself what each layer becomes.
        init: where new weights come from: `data`, `weights`, `random`.
        samples: number of calibration samples.
        exclude: patterns of layers that stay.
        life: the arguments of `CompressionCallback`.

    Raises:
        ValueError: an argument out of range.
    """

    origin: ClassVar[str]

    def __init__(
        self,
        budget: Budget | None,
        *,
        init: Init,
        samples: int,
        exclude: Sequence[str],
        **life: Any,
    ) -> None:
        """Check the arguments."""
        super().__init__(**life)
        if budget is not None:
            require_budget(budget)
            budget.refuse("bit_operations")
        require_choice("init", init, get_args(Init))
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"`samples` must be an integer of at least 1, got {samples!r}")
        self.budget, self.init, self.samples, self.exclude = budget, init, samples, tuple(exclude)
        self.errors: dict[str, float] = {}
        self._since = 0  # edits that the network had been through before this run
        self._plan: tuple[Planner, list[Planned]] | None = None
        self._fit: Fit | None = None

    # What a method answers.

    @abstractmethod
    def forms(self) -> list[Form]:
        """What layers may become; each takes the first that does not refuse it."""

    @abstractmethod
    def everything(self, planner: Planner) -> list[Planned]:
        """The plan without a budget."""

    def within(self, planner: Planner, limits: Mapping[str, float], stopwatch: Stopwatch | None) -> list[Planned]:
        """The plan within limits."""
        return planner.within(limits, stopwatch=stopwatch)

    # What the base asks.

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """See `CompressionCallback`. What the budget can reach does not depend on data, so none is looked at."""
        captured = capture(trainer, pl_module, self.network)
        planner = self._planner(captured, informed=False)
        planner.require()
        dense = dict(planner.dense)
        self._since = len(history(captured.network))
        if self.budget is None:
            self.everything(planner)
        elif self.budget.latency is not None:
            stopwatch = Stopwatch.start(captured.network, captured.calls)
            dense["latency"] = stopwatch.microseconds
            self.within(planner, self.budget.limits(dense), stopwatch)
        else:
            self.within(planner, self.budget.limits(dense), None)
        return dense

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """See `CompressionCallback`."""
        captured = capture(trainer, pl_module, self.network, self.samples)
        planner = self._planner(captured, informed=self.init == "data")
        if not any(edit.origin == self.origin for edit in history(captured.network)):
            planner.require()  # another method may have come between
        if self.budget is None:
            planned = self._next(self.everything(planner), captured, amount)
        else:
            stopwatch = None
            if self.budget.latency is not None:
                stopwatch = Stopwatch.resume(captured.network, self._since, captured.calls, self.dense["latency"])
            planned = self.within(planner, self.budget.relaxed(amount, self.dense), stopwatch)
        self._plan = planner, planned
        return captured, [replacement(planned, self.origin)] if planned else [], planner.left

    def prepare(self, captured: Captured, edits: Sequence[Edit]) -> None:
        """See `CompressionCallback`: one layer after another is fitted on what those before it will give."""
        [edit] = edits
        assert isinstance(edit, Replace)
        assert self._plan is not None
        (planner, planned), self._plan = self._plan, None
        if replacement(planned, self.origin) != edit:  # rank 0 has planned otherwise
            planned = planner.recover(edit)
        self._fit = fit(captured.network, planner.layers, planned, captured.calibration, self.init, self.origin)
        self.errors |= self._fit.errors
        errors = self._fit.errors
        worst = max(errors, key=errors.__getitem__)
        rank_zero_info(
            f"{type(self).__name__}: {len(planned)} layers; relative error of their outputs on calibration data: "
            f"mean {sum(errors.values()) / len(errors):.3f}, largest {errors[worst]:.3f} at {worst}"
        )
        if not planner.computes_less(planned):
            rank_zero_info(
                f"{type(self).__name__}: these layers are smaller, and compute as much as before: not faster"
            )

    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        assert self._fit is not None
        self._fit.apply(self.target(pl_module))
        self._fit = None

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, and what was asked for."""
        given = None if self.budget is None else self.budget.given()
        return {**super().state_dict(), "since": self._since, "budget": given, "errors": dict(self.errors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._since, self.errors = state_dict["since"], dict(state_dict["errors"])
        if state_dict["budget"] != (None if self.budget is None else self.budget.given()):
            self.done = 0.0  # another budget, of the same dense network: what is due by now is still to be done

    def _next(self, planned: Sequence[Planned], captured: Captured, amount: float) -> list[Planned]:
        """Of all layers that are to be replaced, those whose turn it is: in the order that data reaches them."""
        done = sum(
            len(edit.layers)
            for edit in history(captured.network)[self._since :]
            if isinstance(edit, Replace) and edit.origin == self.origin
        )
        left = [item for item in planned if item.layer.spec["type"] != "Chain"]
        return left[: math.ceil(amount * (done + len(left))) - done]

    def _planner(self, captured: Captured, informed: bool) -> Planner:
        keep = dict.fromkeys(captured.outside, "is used outside of the network's calls")
        data = captured.calibration if informed else ()
        return Planner(captured.network, captured.calls, self.forms(), data, self.exclude, keep)
