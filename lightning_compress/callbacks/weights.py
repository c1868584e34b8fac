"""Pruning of single weights in a Lightning run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.edits import ROLES, Edit, named_tensors
from lightning_compress.methods.calibration import input_norms
from lightning_compress.methods.sparsity import (
    ALLOCATIONS,
    CRITERIA,
    Pattern,
    bury,
    exchange,
    gather,
    make_masks,
    score,
    silence,
)
from lightning_compress.optimizers import states_like

__all__ = ["WeightPruning"]


class WeightPruning(HeldWeights):
    """Set weights to zero during training, and hold them there, until a share of them is gone.

    Masks are part of the network's state: they are in checkpoints, and a resumed run has them at once. A pruned weight
    has no gradient and no momentum, and is zero after every step, whatever the optimizer does. The artifact holds the
    zeros entropy-coded, and no masks. Zeros by themselves make no network faster: for that prune channels, or use 2:4
    with a runtime that has kernels for it.

    Args:
        sparsity: share of the prunable weights (of at least two dims) that go; N:M patterns have their own.
        criterion: `magnitude`, `taylor`, `movement`, `snip`, `wanda` or `random`.
        pattern: `unstructured`, `kernel`, `block:AxB`, or N:M as `2:4`.
        allocation: `global`, `uniform`, `erk` or `lamp`.
        start: when the first weights go: a float is a fraction of training, an integer an epoch.
        end: when the last ones go, likewise; the rest of training recovers.
        steps: in how many steps.
        schedule: how the sparsity grows over them: `one_shot`, `linear`, `cubic` (Zhu and Gupta 2017).
        rewind: after each step set the weights that are left back to what they were when training began, as in the
            lottery ticket hypothesis (Frankle and Carbin 2018, arXiv 1803.03635); the optimizer forgets, too.
        regrow: share of the living weights that die and are replaced every `every` steps, between `start` and `end`, by
            those whose gradients are largest (RigL, Evci et al. 2020, arXiv 1911.11134); falls to 0 along a cosine.
        every: optimizer steps between two such exchanges.
        release: when the masks are lifted again and all weights train (dense-sparse-dense, Han et al. 2016, arXiv
            1607.04381): a fraction of training after `end`; None: never.
        floor: least share of each tensor that stays.
        exclude: patterns of parameter or module names that stay as they are.
        samples: number of calibration samples, for `wanda`.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> WeightPruning(0.9, pattern="4:2")
        Traceback (most recent call last):
        ValueError: `pattern` must be unstructured, kernel, block:AxB or N:M, e.g. 2:4, got '4:2'
    """

    role: ClassVar[str] = "mask"
    origin: ClassVar[str] = "weight_pruning"

    def __init__(
        self,
        sparsity: float = 0.9,
        criterion: str = "magnitude",
        pattern: str = "unstructured",
        allocation: str = "global",
        start: float | int = 0.0,
        end: float | int = 0.5,
        steps: int = 10,
        schedule: str = "cubic",
        rewind: bool = False,
        regrow: float = 0.0,
        every: int = 100,
        release: float | None = None,
        floor: float = 0.01,
        exclude: Sequence[str] = (),
        samples: int = 256,
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__(exclude=exclude, start=start, end=end, steps=steps, schedule=schedule, network=network)
        self.pattern = Pattern(pattern)
        for name, value, known in (("criterion", criterion, CRITERIA), ("allocation", allocation, ALLOCATIONS)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")
        for name, share, top in (("sparsity", sparsity, 1), ("regrow", regrow, 1), ("floor", floor, 1)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < top:
                raise ValueError(f"`{name}` must be a share in [0, 1), got {share!r}")
        if not sparsity:
            raise ValueError("`sparsity` must be above 0")
        for name, count in (("every", every), ("samples", samples)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}")
        if release is not None and (not isinstance(release, float) or not 0 < release <= 1):
            raise ValueError(f"`release` must be a fraction of training in (0, 1], got {release!r}")
        if criterion == "snip" and (start != 0 or (steps > 1 and schedule != "one_shot")):
            raise ValueError('criterion="snip" prunes once, before the first step: give start=0.0, schedule="one_shot"')
        if criterion == "movement" and allocation == "lamp":
            raise ValueError("allocation='lamp' compares sizes, and the scores of criterion='movement' have signs")
        if criterion in ("taylor", "movement") and start == 0:
            raise ValueError(
                f"criterion={criterion!r} gathers gradients before the first edit: `start` must be after 0"
            )
        if regrow and self.pattern.name != "unstructured":
            raise ValueError("`regrow` goes with pattern='unstructured'")
        if schedule == "one_shot":
            steps = self.steps = 1
        self.sparsity, self.criterion, self.allocation = float(sparsity), criterion, allocation
        self.rewind, self.regrow, self.every, self.release = rewind, float(regrow), every, release
        self.floor, self.samples = float(floor), samples
        self._gathered: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] = {}
        self._pending = False  # masks wait for the first gradients
        self._released = False
        self._scores: dict[str, Tensor] = {}
        self._dead: list[Tensor] = []
        self._amount = 0.0

    # What the base asks.

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """See `CompressionCallback`."""
        captured = capture(trainer, pl_module, self.network)
        chosen = self.require(captured.network)
        if self.rewind and not self._initial:
            kept = named_tensors(captured.network)
            roles = tuple(f"_{role}" for role in ROLES)
            self._initial = {name: t.detach().clone().cpu() for name, t in kept if not name.endswith(roles)}
        return {"weights": float(sum(weight.numel() for weight in chosen.values()))}

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """See `CompressionCallback`."""
        wanda = self.criterion == "wanda"
        captured = capture(trainer, pl_module, self.network, self.samples if wanda else 1)
        chosen, left = self.choose(captured.network)
        self._pending = self.criterion == "snip"
        if not self._pending:
            norms = input_norms(captured.network, captured.calibration) if wanda else {}
            masks = {name: mask for name, _, mask in self.held(captured.network)}
            self._scores = bury({n: self._score(n, weight, norms.get(n)) for n, weight in chosen.items()}, masks)
        self._amount = amount
        return captured, self.companions(captured.network, chosen), left

    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        self.changed()
        network = self.target(pl_module)
        if self._pending:
            for _, _, mask in self.held(network):
                mask.fill_(1)
            self.changed()
            return
        masks = make_masks(self._scores, self.sparsity, self.pattern, self.allocation, self.floor, self._amount)
        self._scores = {}
        self._set_masks(trainer, network, masks)
        if self._amount >= 1.0:
            self._gathered = {}
        if self.rewind:
            self._go_back(trainer, network)

    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather gradients where the criterion needs them; take the gradients of dead weights away."""
        if self._released:
            return
        network = self.target(pl_module)
        if self.done < 1.0 and self.criterion in ("taylor", "movement"):
            for name, weight in self.choose(network)[0].items():
                if weight.grad is not None:
                    before = self._gathered.get(name)
                    before = before if before is not None and before.shape == weight.shape else None
                    self._gathered[name] = gather(self.criterion, weight, weight.grad, before)
        if self._pending:
            scores = {
                name: gather("snip", weight, weight.grad, None)
                for name, weight, _ in self.held(network)
                if weight.grad is not None
            }
            masks = make_masks(scores, self.sparsity, self.pattern, self.allocation, self.floor)
            self._set_masks(trainer, network, masks)
            self._pending = False
        if self._exchanges(trainer):
            self._exchange(trainer, network)
        silence((weight.grad for _, weight, _ in self.held(network)), self._graves(network))

    # The life.

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`; masks are lifted when it is time for that."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.release is not None and not self._released and _progress(trainer) >= self.release:
            if self.done < 1.0:
                raise MisconfigurationException(f"`release`={self.release} comes before the last weights have gone")
            self._released = True
            rank_zero_info(f"WeightPruning: masks are lifted at epoch {trainer.current_epoch}")

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, and what masks do not tell."""
        return {
            **super().state_dict(),
            "gathered": dict(self._gathered),
            "initial": dict(self._initial),
            "pending": self._pending,
            "released": self._released,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._gathered, self._initial = dict(state_dict["gathered"]), dict(state_dict["initial"])
        self._pending, self._released = state_dict["pending"], state_dict["released"]

    # Weights and masks.

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """See `HeldWeights`."""
        return self.pattern.refuses(weight)

    def changed(self) -> None:
        """See `HeldWeights`."""
        super().changed()
        self._dead = []

    def hold(self, network: nn.Module) -> None:
        """See `HeldWeights`: dead weights are zero."""
        if not self._released:
            silence((weight for _, weight, _ in self.held(network)), self._graves(network))

    def _graves(self, network: nn.Module) -> list[Tensor]:
        """Where weights are dead."""
        if not self._dead:
            self._dead = [mask == 0 for _, _, mask in self.held(network)]
        return self._dead

    def _score(self, name: str, weight: Tensor, norm: Tensor | None) -> Tensor:
        seed = sum(map(ord, name)) + int(1000 * self.done)  # another draw at each edit, the same on every rank
        try:
            return score(self.criterion, weight, norm, self._gathered.get(name), seed)
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error

    @torch.no_grad()
    def _set_masks(self, trainer: pl.Trainer, network: nn.Module, masks: Mapping[str, Tensor]) -> None:
        gone = total = 0
        for name, weight, mask in self.held(network):
            if name not in masks:
                mask.fill_(1)
                continue
            mask.copy_(masks[name])
            gone, total = gone + int((mask == 0).sum()), total + mask.numel()
            self._forget(trainer, weight, mask)
        self.changed()
        self.hold(network)
        rank_zero_info(f"WeightPruning: {gone / max(total, 1):.2%} of {total:,} weights are zero")

    @staticmethod
    def _forget(trainer: pl.Trainer, weight: nn.Parameter, mask: Tensor) -> None:
        """Dead weights have no momentum."""
        for value in states_like(trainer.optimizers, weight):
            silence([value], [mask == 0])

    @torch.no_grad()
    def _go_back(self, trainer: pl.Trainer, network: nn.Module) -> None:
        for name, value in named_tensors(network):
            if name in self._initial and self._initial[name].shape == value.shape:
                value.copy_(self._initial[name])
        self.hold(network)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    # RigL.

    def _exchanges(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        due = bool(self.regrow and self.done >= 1.0 and step and step % self.every == 0)
        return due and _progress(trainer) < self._until(trainer)

    def _until(self, trainer: pl.Trainer) -> float:
        return self.end if isinstance(self.end, float) else self.end / (trainer.max_epochs or math.inf)

    @torch.no_grad()
    def _exchange(self, trainer: pl.Trainer, network: nn.Module) -> None:
        """The smallest of the living weights die; of the dead ones, those with the largest gradients live."""
        share = self.regrow / 2 * (1 + math.cos(math.pi * _progress(trainer) / self._until(trainer)))
        for _, weight, mask in self.held(network):
            if weight.grad is not None:
                exchange(weight.detach(), mask, weight.grad, share)
                self._forget(trainer, weight, mask)
        self.changed()
        self.hold(network)


def _progress(trainer: pl.Trainer) -> float:
    total = trainer.estimated_stepping_batches
    return trainer.global_step / total if total and math.isfinite(total) else 0.0
