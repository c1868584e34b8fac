"""Pruning in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.budget import Budget, require_budget
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.emptying import Emptying, Marked
from lightning_compress.coupling import Coupling, Location, Settled, trace_coupling
from lightning_compress.edits import Companions, Edit, history
from lightning_compress.methods.choosing import Ranking, Selection, costs
from lightning_compress.methods.criteria import GATHERED, activation_terms, gradient_terms
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.pruning import freeze_kept, plan_channels
from lightning_compress.methods.refit import Refit

__all__ = ["ChannelPruning"]


class ChannelPruning(CompressionCallback):
    """Remove channels during training until the network fits a budget.

    The channels are really gone after each edit: smaller tensors, fewer multiply-accumulates. What a cut channel did is
    taken over by those that remain, by least squares on calibration data, and BatchNorm statistics are re-estimated.
    Channels that the network's code does not allow to go are found, left in place and reported.

    Args:
        budget: what may be left. Latency is timed as the run goes: another run's edits may differ a little.
        criterion: what tells channels that matter: `l1` (Li et al. 2017, arXiv 1608.08710), `l2` (He et al. 2018, arXiv
            1808.06866), `fpgm` (He et al. 2019, arXiv 1811.00250), `bn_scale` (Liu et al. 2017, arXiv 1708.06519),
            `taylor` (Molchanov et al. 2019, arXiv 1906.10771), `fisher` (LeCun et al. 1989), `activation` (Hu et al.
            2016, arXiv 1607.03250), `lamp` (Lee et al. 2021, arXiv 2010.07611) or `random`.
        ranking: `global` (all layers compete), `layer` (each loses the same fraction) or `isomorphic` (layers of the
            same structure compete, and each such class loses the same fraction).
        start: when the first edit is made: a float is a fraction of training, an integer an epoch.
        end: when the last edit is made, likewise; the rest of training recovers.
        steps: number of edits.
        schedule: how the amount grows over them: `one_shot`, `linear`, `cubic`.
        round_to: layers keep multiples of this many channels.
        exclude: patterns of module names whose output channels stay.
        floor: smallest fraction of a layer's channels that stays.
        refit: refit what remains and re-estimate BatchNorm after each edit.
        samples: number of calibration samples for it.
        regularization: what empties channels before the last edit: `slimming` (L1 on norm scales, for `bn_scale`),
            `group_lasso` or `group_norm` (on all the weights of a channel, wherever they are), `growing` (channels are
            marked long before they are cut, and pulled to zero ever harder); None: nothing. Added to the gradients
            before they are clipped.
        strength: of that; by default what `REGULARIZATIONS` has for it.
        sensitivity: power of each layer's sensitivity that its scores are multiplied by, so that layers lose less that
            the outputs depend on; 0.1 is gentle. Measured before each edit, by one run on at most 64 samples for each
            layer.
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
        ranking: Ranking = "global",
        start: float | int = 0.0,
        end: float | int = 0.5,
        steps: int = 5,
        schedule: str = "cubic",
        round_to: int = 1,
        exclude: Sequence[str] = (),
        floor: float = Selection.floor,
        refit: bool = True,
        samples: int = 256,
        regularization: str | None = None,
        strength: float | None = None,
        sensitivity: float = 0.0,
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__(start=start, end=end, steps=steps, schedule=schedule, network=network)
        require_budget(budget)
        budget.refuse("bit_operations")
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"`samples` must be an integer of at least 1, got {samples!r}")
        self.selection = Selection(criterion, ranking, round_to, exclude, floor, sensitivity)
        if criterion in GATHERED and start == 0:
            raise ValueError(
                f"criterion={criterion!r} gathers gradients before the first edit: `start` must be after 0"
            )
        self.budget, self.refit, self.samples = budget, refit, samples
        self._emptying = Emptying(regularization, strength, criterion, start, end)
        self._since = 0  # edits that the network had been through before this run
        self._saliency: dict[Location, Tensor] = {}
        self._coupling: Coupling | None = None
        self._refit: Refit | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`; what a run before this one has found out is not of this network."""
        super().setup(trainer, pl_module, stage)
        self._forget_structure()

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Plan the whole budget once, on a copy, and throw the plan away."""
        captured = capture(trainer, pl_module, self.network)
        coupling = trace_coupling(captured.network, captured.calls)
        dense = costs(coupling)
        self._since = len(history(captured.network))
        if self.budget.latency is not None:
            dense["latency"] = Stopwatch.start(captured.network, captured.calls).microseconds
        # Whether a budget can be met does not depend on the order of the channels, and gradients there are none yet.
        selection = replace(self.selection, sensitivity=0.0)
        if selection.criterion in (*GATHERED, "activation"):
            selection = replace(selection, criterion="l2")
        self._plan(captured, coupling, selection, self.budget.limits(dense), dense, {})
        return dense

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """Plan one step of the way, and solve for the weights that will remain."""
        captured, coupling, settled = self._plan_step(trainer, pl_module, amount)
        self._forget_structure()
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

    def after_edits(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        path: str,
        edits: Sequence[Edit],
        frozen: Mapping[str, str],
    ) -> None:
        """What is known of the network's structure is out of date, whoever changed it; masks beside weights do not."""
        if any(not isinstance(edit, Companions) for edit in edits):
            self._forget_structure()

    # Between edits.

    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Until the last edit: gather terms of the loss's gradients, where the criterion needs them."""
        if self.done < 1.0 and self.selection.criterion in GATHERED:
            network = self.target(pl_module)
            parameters = dict(network.named_parameters(remove_duplicate=False))
            coupling = self._structure(trainer, pl_module)
            self._saliency = gradient_terms(coupling, parameters, self._saliency, self.selection.criterion)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """See `CompressionCallback`; then regularise, of all parameters those that this optimizer will move."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._emptying.regularization is None or self.done >= 1.0:
            return
        network = self.target(pl_module)
        self._emptying.pull(
            trainer,
            network,
            optimizer,
            lambda: self._structure(trainer, pl_module),
            lambda: self._mark(trainer, pl_module),
        )

    def _mark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Marked:
        due = next(milestone for milestone in self._milestones if milestone.amount > self.done)
        return Marked.now(trainer, due, self._plan_step(trainer, pl_module, due.amount)[2])

    def _structure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Coupling:
        """The coupling, traced once between two edits."""
        if self._coupling is None:
            captured = capture(trainer, pl_module, self.network)
            self._coupling = trace_coupling(captured.network, captured.calls)
            freeze_kept(self._coupling, self.selection.exclude, _outside(captured))
        return self._coupling

    def _forget_structure(self) -> None:
        self._saliency, self._coupling = {}, None
        self._emptying.forget()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, what was asked for, and what was gathered and marked since the last edit."""
        return {
            **super().state_dict(),
            "saliency": [(name, dim, value) for (name, dim), value in self._saliency.items()],
            "since": self._since,
            "budget": self.budget.given(),
            "marked": self._emptying.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._since = state_dict["since"]
        self._saliency = {(name, dim): value for name, dim, value in state_dict["saliency"]}
        same = state_dict["budget"] == self.budget.given()
        if not same:
            self.done = 0.0  # another budget, of the same dense network: what is due by now is still to be done
        self._emptying.load_state_dict(state_dict["marked"] if same else None)

    # Plans.

    def _plan_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Coupling, Settled | None]:
        """Plan `amount` of the way."""
        captured = capture(trainer, pl_module, self.network, self.samples)
        coupling = trace_coupling(captured.network, captured.calls)
        active = self.selection.criterion == "activation"
        saliency = activation_terms(coupling, captured.calibration) if active else self._saliency
        limits = self.budget.relaxed(amount, self.dense)
        return captured, coupling, self._plan(captured, coupling, self.selection, limits, self.dense, saliency)

    def _plan(
        self,
        captured: Captured,
        coupling: Coupling,
        selection: Selection,
        limits: Mapping[str, float],
        dense: Mapping[str, float],
        saliency: Mapping[Location, Tensor],
    ) -> Settled | None:
        stopwatch, marked = None, self._emptying.marked
        if "latency" in limits:
            stopwatch = Stopwatch.resume(captured.network, self._since, captured.calls, dense["latency"])
        return plan_channels(
            coupling,
            selection,
            limits=limits,
            saliency=saliency,
            stopwatch=stopwatch,
            keep=_outside(captured),
            seed=int(self.done * 1000),  # another draw at each edit, the same on every rank and after a resume
            first=None if marked is None else marked.classes(coupling),
            calibration=captured.calibration,
        )


def _outside(captured: Captured) -> dict[str, str]:
    return dict.fromkeys(captured.outside, "is used outside of the network's calls")
