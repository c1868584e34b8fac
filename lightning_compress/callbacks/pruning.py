"""Pruning in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_compress.budget import Budget
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import Captured, capture, find_network
from lightning_compress.coupling import Coupling, Location, Settled, trace_coupling
from lightning_compress.edits import Edit, history
from lightning_compress.methods.choosing import Selection, costs
from lightning_compress.methods.criteria import GATHERED, activation_terms, add_sparsity_gradient, gradient_terms
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.pruning import plan_channels
from lightning_compress.methods.refit import Refit

__all__ = ["ChannelPruning"]


class ChannelPruning(CompressionCallback):
    """Remove channels during training until the network fits a budget.

    The channels are really gone after each edit: smaller tensors, fewer multiply-accumulates. What a cut channel did is
    taken over by those that remain, by least squares on calibration data, and BatchNorm statistics are re-estimated.
    Channels that the network's code does not allow to go are found, left in place and reported.

    Args:
        budget: what may be left. Latency is timed as the run goes: another run's edits may differ a little.
        criterion: what tells channels that matter: `l1`, `l2`, `fpgm`, `bn_scale`, `taylor`, `fisher`,
            `activation`, `lamp`, `random`.
        ranking: `global` (all layers compete) or `layer` (each loses the same fraction).
        start: when the first edit is made: a float is a fraction of training, an integer an epoch.
        end: when the last edit is made, likewise; the rest of training recovers.
        steps: number of edits.
        schedule: how the amount grows over them: `one_shot`, `linear`, `cubic`.
        round_to: layers keep multiples of this many channels.
        exclude: patterns of module names whose output channels stay.
        floor: smallest fraction of a layer's channels that stays.
        refit: refit what remains and re-estimate BatchNorm after each edit.
        samples: number of calibration samples for it.
        sparsity: strength of the L1 pull on norm scales before the last edit (network slimming); for `bn_scale`.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> ChannelPruning(Budget(macs=0.5), criterion="l3")
        Traceback (most recent call last):
        ValueError: `criterion` must be one of l1, l2, fpgm, bn_scale, taylor, fisher, activation, ...
    """

    def __init__(
        self,
        budget: Budget,
        criterion: str = "l2",
        ranking: Literal["global", "layer"] = "global",
        start: float | int = 0.0,
        end: float | int = 0.5,
        steps: int = 5,
        schedule: str = "cubic",
        round_to: int = 1,
        exclude: Sequence[str] = (),
        floor: float = Selection.floor,
        refit: bool = True,
        samples: int = 256,
        sparsity: float = 0.0,
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__(start=start, end=end, steps=steps, schedule=schedule, network=network)
        if not isinstance(budget, Budget):
            raise ValueError(f"`budget` must be a Budget, e.g. Budget(macs=0.5), got {budget!r}")
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"`samples` must be an integer of at least 1, got {samples!r}")
        if sparsity < 0 or (sparsity and criterion != "bn_scale"):
            raise ValueError(
                f"`sparsity` must be >= 0 and goes with criterion='bn_scale', got {sparsity!r} with {criterion!r}"
            )
        self.selection = Selection(criterion, ranking, round_to, exclude, floor)
        if criterion in GATHERED and start == 0:
            raise ValueError(
                f"criterion={criterion!r} gathers gradients before the first edit: `start` must be after 0"
            )
        self.budget, self.refit, self.samples, self.sparsity = budget, refit, samples, sparsity
        self._since = 0  # edits that the network had been through before this run
        self._saliency: dict[Location, Tensor] = {}
        self._gathered: Coupling | None = None
        self._refit: Refit | None = None

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Plan the whole budget once, on a copy, and throw the plan away."""
        captured = capture(trainer, pl_module, self.network)
        coupling = trace_coupling(captured.network, captured.calls)
        dense = costs(coupling)
        self._since = len(history(captured.network))
        if self.budget.latency is not None:
            dense["latency"] = Stopwatch.start(captured.network, captured.calls).microseconds
        # Whether a budget can be met does not depend on the order of the channels, and gradients there are none yet.
        selection = self.selection
        if selection.criterion in (*GATHERED, "activation"):
            selection = replace(selection, criterion="l2")
        self._plan(captured, coupling, selection, self.budget.limits(dense), dense)
        return dense

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """Plan one step of the way, and solve for the weights that will remain."""
        captured = capture(trainer, pl_module, self.network, self.samples)
        coupling = trace_coupling(captured.network, captured.calls)
        if self.selection.criterion == "activation":
            self._saliency = activation_terms(coupling, captured.calibration)
        settled = self._plan(captured, coupling, self.selection, self.budget.relaxed(amount, self.dense), self.dense)
        self._saliency, self._gathered = {}, None
        if settled is None:
            return captured, (), coupling.reasons
        if self.refit:
            self._refit = Refit(captured.network, coupling, settled.cut, captured.calibration)
        return captured, (settled.keep,), coupling.reasons

    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the refitted weights."""
        if self._refit is not None:
            self._refit.apply()
            self._refit = None

    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Until the last edit: gather terms of gradients, pull norm scales towards zero."""
        if self.done >= 1.0 or not (self.sparsity or self.selection.criterion in GATHERED):
            return
        network = pl_module.get_submodule(find_network(pl_module, self.network))
        if self.sparsity:
            add_sparsity_gradient(network, self.sparsity)
        if self.selection.criterion in GATHERED:
            if self._gathered is None:
                captured = capture(trainer, pl_module, self.network)
                self._gathered = trace_coupling(captured.network, captured.calls)
            parameters = dict(network.named_parameters(remove_duplicate=False))
            self._saliency = gradient_terms(self._gathered, parameters, self._saliency, self.selection.criterion)

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, what was asked for, and the terms gathered since the last edit."""
        saliency = [(name, dim, value) for (name, dim), value in self._saliency.items()]
        return {**super().state_dict(), "saliency": saliency, "since": self._since, "budget": self.budget.given()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._since = state_dict["since"]
        if state_dict["budget"] != self.budget.given():
            self.done = 0.0  # another budget, of the same dense network: what is due by now is still to be done
        self._saliency = {(name, dim): value for name, dim, value in state_dict["saliency"]}

    def _plan(
        self,
        captured: Captured,
        coupling: Coupling,
        selection: Selection,
        limits: Mapping[str, float],
        dense: Mapping[str, float],
    ) -> Settled | None:
        stopwatch = None
        if "latency" in limits:
            stopwatch = Stopwatch.resume(captured.network, self._since, captured.calls, dense["latency"])
        keep = dict.fromkeys(captured.outside, "is used outside of the network's calls")
        seed = int(self.done * 1000)  # another draw at each edit, the same on every rank and after a resume
        return plan_channels(
            coupling, selection, limits=limits, saliency=self._saliency, stopwatch=stopwatch, keep=keep, seed=seed
        )
