"""Weights with masks in a Lightning run: the dead are zero, have no gradient and no momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.callbacks.timing import progress
from lightning_compress.methods.sparsity import exchange, silence
from lightning_compress.optimizers import states_like

__all__ = ["MaskedWeights", "Regrowth"]


class MaskedWeights(HeldWeights):
    """Base of the callbacks whose weights have masks beside them: 1 where a weight lives.

    Args:
        life: the arguments of `HeldWeights`.

    Attributes:
        lifted: whether the masks are there and do nothing.
    """

    role: ClassVar[str] = "mask"

    def __init__(self, **life: Any) -> None:
        """Keep the arguments."""
        super().__init__(**life)
        self.lifted = False
        self._dead: list[Tensor] = []

    def changed(self) -> None:
        """See `HeldWeights`."""
        super().changed()
        self._dead = []

    def hold(self, network: nn.Module) -> None:
        """See `HeldWeights`: dead weights are zero."""
        if not self.lifted:
            silence((weight for _, weight, _ in self.held(network)), self.graves(network))

    def graves(self, network: nn.Module) -> list[Tensor]:
        """Where weights are dead."""
        if not self._dead:
            self._dead = [mask == 0 for _, _, mask in self.held(network)]
        return self._dead

    @torch.no_grad()
    def set_masks(self, trainer: pl.Trainer, network: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of some weights; those of all others are lifted."""
        gone = total = 0
        for name, weight, mask in self.held(network):
            if name not in masks:
                mask.fill_(1)
                continue
            mask.copy_(masks[name])
            gone, total = gone + int((mask == 0).sum()), total + mask.numel()
            self.forget(trainer, weight, mask)
        self.changed()
        self.hold(network)
        rank_zero_info(f"{type(self).__name__}: {gone / max(total, 1):.2%} of {total:,} weights are zero")

    @staticmethod
    def forget(trainer: pl.Trainer, weight: nn.Parameter, mask: Tensor) -> None:
        """Dead weights have no momentum."""
        for value in states_like(trainer.optimizers, weight):
            silence([value], [mask == 0])

    @torch.no_grad()
    def exchange(self, trainer: pl.Trainer, network: nn.Module, share: float) -> None:
        """The smallest of the living weights die; of the dead ones, those with the largest gradients live."""
        for _, weight, mask in self.held(network):
            if weight.grad is not None:
                exchange(weight.detach(), mask, weight.grad, share)
                self.forget(trainer, weight, mask)
        self.changed()
        self.hold(network)


@dataclass(frozen=True)
class Regrowth:
    """When masks move, and by how much: RigL (Evci et al. 2020, arXiv 1911.11134).

    Attributes:
        share: of the living weights that are exchanged at first; 0: none, ever.
        every: optimizer steps between two exchanges.
        end: when the last one is: a float is a fraction of training, an integer an epoch.
    """

    share: float
    every: int
    end: float | int

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether weights are exchanged at this step."""
        step = trainer.global_step
        return bool(self.share and step and step % self.every == 0) and progress(trainer) < self._until(trainer)

    def now(self, trainer: pl.Trainer) -> float:
        """The share at this step; falls to 0 along a cosine."""
        return self.share / 2 * (1 + math.cos(math.pi * progress(trainer) / self._until(trainer)))

    def _until(self, trainer: pl.Trainer) -> float:
        return self.end if isinstance(self.end, float) else self.end / (trainer.max_epochs or math.inf)
