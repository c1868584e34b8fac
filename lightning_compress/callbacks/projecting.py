"""Projectors in a run: parameters that train beside the user's, and are in no module of theirs."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

__all__ = ["Projected"]


class Projected:
    """Keeps an optimizer's view of the projectors up to date.

    They join the parameter group that holds most of the student: its learning rate and schedule are theirs. A group of
    their own would not do, since learning rate schedulers count the groups when they are made.
    """

    def __init__(self) -> None:
        self._held: list[nn.Parameter] = []

    def follow(self, trainer: pl.Trainer, student: nn.Module, projectors: nn.Module) -> None:
        """Bring the optimizer from the projectors that it holds to these.

        Raises:
            MisconfigurationException: no optimizer holds the student.
        """
        wanted = list(projectors.parameters())
        if [id(p) for p in wanted] == [id(p) for p in self._held]:
            return
        old = {id(p) for p in self._held}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in old]
            for parameter in self._held:
                optimizer.state.pop(parameter, None)
        if wanted:
            _main_group(trainer.optimizers, student)["params"].extend(wanted)
        self._held = wanted

    def average_gradients(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """What DDP does for the parameters that it knows, before the step of the optimizer that holds these."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if trainer.world_size > 1 and self._held and id(self._held[0]) in held:
            for parameter in self._held:
                if parameter.grad is not None:
                    parameter.grad.copy_(trainer.strategy.reduce(parameter.grad, reduce_op="mean"))

    def forget(self) -> None:
        """The run is over."""
        self._held = []


def _main_group(optimizers: Iterable[Optimizer], student: nn.Module) -> dict[str, list[nn.Parameter]]:
    own = {id(p) for p in student.parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    sizes = [sum(p.numel() for p in group["params"] if id(p) in own) for group in groups]
    if not any(sizes):
        raise MisconfigurationException(
            "no optimizer holds a parameter of the student: its projectors cannot be trained"
        )
    return groups[sizes.index(max(sizes))]
