"""What empties channels before they are cut: the regularisers of channel pruning, in a Lightning run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.timing import Milestone, position
from lightning_compress.coupling import Coupling, Mask, Settled
from lightning_compress.edits import Keep, edits_from_json, edits_to_json
from lightning_compress.methods.criteria import GATHERED
from lightning_compress.methods.regularization import (
    REGULARIZATIONS,
    ChannelSlices,
    cut_of,
    group_norm_factors,
    growth,
    lasso_factors,
    norm_scales,
    pull_scales,
)
from lightning_compress.wording import require_choice

__all__ = ["Emptying", "Marked"]


@dataclass(frozen=True)
class Marked:
    """Channels that wait to be cut.

    Attributes:
        plan: the edit that would cut them, as JSON data; empty if nothing is to be cut.
        unit: of the next two.
        begun: when they were marked.
        until: when they will be cut.
    """

    plan: Sequence[dict[str, Any]]
    unit: str
    begun: float
    until: float

    @classmethod
    def now(cls, trainer: pl.Trainer, due: Milestone, settled: Settled | None) -> Marked:
        """Mark what is planned for a milestone; as for edits, it is rank 0's plan that counts."""
        plan = edits_to_json([] if settled is None else [settled.keep])
        return cls(trainer.strategy.broadcast(plan), due.unit, position(trainer, due.unit), due.at)

    def classes(self, coupling: Coupling) -> Mask:
        """The channels, as classes of a coupling of the network."""
        cut = coupling.nothing_cut()
        for edit in edits_from_json(self.plan):
            assert isinstance(edit, Keep)
            cut |= cut_of(coupling, edit)
        return cut

    def growth(self, trainer: pl.Trainer) -> float:
        """How far the pull on them has grown, from 0 to 1."""
        return growth((position(trainer, self.unit) - self.begun) / max(self.until - self.begun, 1e-9))


class Emptying:
    """A regularisation of channels, between two edits.

    Args:
        regularization: a name in `REGULARIZATIONS`; None: there is none.
        strength: of it; None: its default.
        criterion: by which channels are chosen.
        start: when the first edit is made.
        end: when the last one is.

    Attributes:
        marked: for `growing`, the channels that will be cut; part of the run's state.

    Raises:
        ValueError: another name; a strength that is not above 0; what does not go together.
    """

    def __init__(
        self, regularization: str | None, strength: float | None, criterion: str, start: float | int, end: float | int
    ) -> None:
        """Check the arguments."""
        if regularization is None:
            if strength is not None:
                raise ValueError(f"`strength`={strength!r} goes with `regularization`, which is None")
        elif regularization not in REGULARIZATIONS:
            require_choice("regularization", regularization, REGULARIZATIONS)
        else:
            _check_together(regularization, strength, criterion, start, end)
        self.regularization = regularization
        self.marked: Marked | None = None
        self.strength = REGULARIZATIONS.get(regularization or "", 0.0) if strength is None else float(strength)
        self._slices: ChannelSlices | None = None
        self._emptied: Tensor | None = None

    def forget(self) -> None:
        """The network has another structure."""
        self.marked, self._slices, self._emptied = None, None, None

    def pull(
        self,
        trainer: pl.Trainer,
        network: nn.Module,
        optimizer: Optimizer,
        structure: Callable[[], Coupling],
        mark: Callable[[], Marked],
    ) -> None:
        """Add to the gradients, of all parameters to those that an optimizer is about to move.

        Args:
            trainer: says how far the run is.
            network: the network.
            optimizer: the optimizer.
            structure: gives the coupling, when it is needed.
            mark: chooses what the next edit will cut, when it is needed.
        """
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.regularization == "slimming":
            pull_scales((scale for scale in norm_scales(network) if id(scale) in moved), self.strength)
            return
        if self._slices is None:
            self._slices = ChannelSlices(structure())
        parameters = dict(network.named_parameters(remove_duplicate=False))
        strength = self.strength
        if self.regularization == "growing":
            self.marked = self.marked or mark()
            if self._emptied is None:
                self._emptied = self._slices.among(self.marked.classes(structure()))
            factors, strength = self._emptied, strength * self.marked.growth(trainer)
        elif self.regularization == "group_norm":
            factors = group_norm_factors(self._slices, self._slices.norms(parameters))
        else:
            factors = lasso_factors(self._slices.norms(parameters))
        self._slices.pull({name: p for name, p in parameters.items() if id(p) in moved}, factors, strength)

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run cannot work out again."""
        return None if self.marked is None else dict(vars(self.marked))

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """The inverse of `state_dict`."""
        self.marked = None if state_dict is None else Marked(**state_dict)


def _check_together(
    regularization: str, strength: float | None, criterion: str, start: float | int, end: float | int
) -> None:
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if strength is not None and not (number and 0 < strength < float("inf")):
        raise ValueError(f"`strength` must be above 0, got {strength!r}")
    if regularization == "slimming" and criterion != "bn_scale":
        raise ValueError(f"regularization='slimming' goes with criterion='bn_scale', got {criterion!r}")
    if regularization == "growing" and criterion in GATHERED:
        raise ValueError(
            f"regularization='growing' marks channels before criterion={criterion!r} has gradients: use another"
        )
    if regularization == "growing" and start == 0:
        raise ValueError("regularization='growing' needs time before the first edit: `start` must be after 0")
    if end == 0:
        raise ValueError(f"regularization={regularization!r} acts before the last edit: `end` must be after 0")
