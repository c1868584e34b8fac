"""Latents that stand in for their values while an optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.methods.latent import Latent

__all__ = ["Held", "Lending"]

Held = tuple[str, nn.Parameter, Tensor]
"""Name, weight and latent."""


class Lending:
    """Weights hold values, and their latents for the time of an optimizer's step.

    Args:
        kind: how values follow from latents.

    Attributes:
        memory: name of a weight -> what the kind knows beside its latents.
        hard: whether soft values are hard ones by now.
    """

    def __init__(self, kind: Latent) -> None:
        self.kind = kind
        self.memory: dict[str, Tensor] = {}
        self.hard = False
        self._lent: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._turned: set[int] = set()  # optimizers whose gradients are those of latents

    @torch.no_grad()
    def begin(self, held: Iterable[Held]) -> None:
        """Weights become latents."""
        for name, weight, latent in held:
            latent.copy_(weight)
            self.memory[name] = self.kind.begin(latent)

    @torch.no_grad()
    def turn(self, optimizer: Optimizer, held: Sequence[Held]) -> None:
        """Make an optimizer's gradients at the values into those at the latents."""
        for name, weight, latent in _of(optimizer, held):
            if weight.grad is not None:
                weight.grad.copy_(self.kind.gradient(latent, self._recall(name, latent), weight.grad))
        self._turned.add(id(optimizer))

    @torch.no_grad()
    def lend(self, optimizer: Optimizer, held: Sequence[Held]) -> None:
        """Give an optimizer, for its step, the latents of its weights."""
        if id(optimizer) not in self._turned:  # a step that Lightning does not know of
            self.turn(optimizer, held)
        self._turned.discard(id(optimizer))
        for name, weight, latent in _of(optimizer, held):
            if self.kind.learns and weight.grad is not None:
                rate = next(float(g["lr"]) for g in optimizer.param_groups if any(p is weight for p in g["params"]))
                self.memory[name] = self.kind.learn(latent, self._recall(name, latent), weight.grad, rate)
            weight.copy_(latent)
            self._lent[name] = weight, latent

    @torch.no_grad()
    def take_back(self) -> None:
        """What an optimizer was lent is latents, as it left them; the weights become values again."""
        lent, self._lent = self._lent, {}
        for name, (weight, latent) in lent.items():
            latent.copy_(weight)
            self._settle(name, weight, latent)

    @torch.no_grad()
    def settle(self, held: Iterable[Held]) -> None:
        """Work out the values from the latents as they are."""
        for entry in held:
            self._settle(*entry)

    def forget(self) -> None:
        """A run is over, however it ended."""
        self.take_back()
        self._turned.clear()

    def _settle(self, name: str, weight: nn.Parameter, latent: Tensor) -> None:
        moved, memory = self.kind.follow(latent, self._recall(name, latent))
        latent.copy_(moved)
        weight.copy_(self.kind.values(latent, memory, self.hard))
        self.memory[name] = memory

    def _recall(self, name: str, latent: Tensor) -> Tensor:
        return self.memory[name].to(latent.device)  # a checkpoint may have been loaded elsewhere


def _of(optimizer: Optimizer, held: Sequence[Held]) -> list[Held]:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [entry for entry in held if id(entry[1]) in own]
