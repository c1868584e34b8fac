"""Weight sharing in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget, BudgetError
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.edits import Edit, companion
from lightning_compress.methods.calibration import input_norms
from lightning_compress.methods.coding import encode
from lightning_compress.methods.patterns import matches
from lightning_compress.methods.sharing import MAX_BITS, Start, cluster, settle, share_within, tie
from lightning_compress.optimizers import states_like
from lightning_compress.wording import require_choice

__all__ = ["WeightSharing"]


class WeightSharing(HeldWeights):
    """Let the weights of each layer share a few values, and go on training these values.

    From the edit on, all weights of a cluster move together: their gradients are tied, so that what is trained is a
    codebook for each layer, as in Deep Compression (Han, Mao and Dally 2015, arXiv 1510.00149). Zeros stay zero. The
    network computes as before, with dense weights, and is no faster; its file is smaller, since the artifact codes
    repeated values.

    Args:
        bits: logarithm of the number of values of each layer (zero is not among them); or pattern of parameter names
            -> bits, where the first that matches counts and layers that none matches stay; None, with a budget.
        budget: of bytes: bits are shared out over layers, from 1 to 8, by the error of their outputs for the bytes of
            the coded file that are saved.
        start: when weights are shared: a float is a fraction of training, an integer an epoch.
        clustering: where k-means starts: `exact` (the best clustering), `linear`, `density`, `random`.
        groups: of output channels of each layer, each with a codebook of its own; 1: one for a layer.
        gradient: what moves a value: the `mean` of its weights' gradients, or their `sum`, as in the paper, which needs
            a learning rate that fits.
        samples: number of calibration samples, for a budget.
        exclude: patterns of parameter or module names that stay as they are.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> WeightSharing(bits=9)
        Traceback (most recent call last):
        ValueError: `bits` must be from 1 to 8, got 9
    """

    role: ClassVar[str] = "code"
    origin: ClassVar[str] = "weight_sharing"

    def __init__(
        self,
        bits: int | Mapping[str, int] | None = 5,
        budget: Budget | None = None,
        start: float | int = 0.5,
        clustering: Start = "exact",
        groups: int = 1,
        gradient: str = "mean",
        samples: int = 256,
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__(exclude=exclude, start=start, end=start, steps=1, schedule="one_shot", network=network)
        if (bits is None) == (budget is None):
            raise ValueError(f"give either `bits` or `budget`, got bits={bits!r} and budget={budget!r}")
        if budget is not None and (not isinstance(budget, Budget) or budget.given().keys() != {"bytes"}):
            raise ValueError(f"`budget` must be a Budget of bytes alone, e.g. Budget(bytes=0.1), got {budget!r}")
        for value in bits.values() if isinstance(bits, Mapping) else [] if bits is None else [bits]:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_BITS:
                raise ValueError(f"`bits` must be from 1 to {MAX_BITS}, got {value!r}")
        require_choice("clustering", clustering, get_args(Start))
        if gradient not in ("mean", "sum"):
            raise ValueError(f"`gradient` must be mean or sum, got {gradient!r}")
        for name, count in (("groups", groups), ("samples", samples)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}")
        self.bits = dict(bits) if isinstance(bits, Mapping) else bits
        self.budget, self.clustering, self.gradient = budget, clustering, gradient
        self.groups, self.samples = groups, samples
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        self._counts: list[int] = []

    # What the base asks.

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """See `CompressionCallback`."""
        captured = capture(trainer, pl_module, self.network)
        self.require(captured.network, self.bits if isinstance(self.bits, dict) else ())
        dense = {"bytes": float(artifact_bytes(captured.network))}
        others = [c for c in trainer.callbacks if isinstance(c, CompressionCallback) and c is not self]  # type: ignore[attr-defined]
        if self.budget is not None and not others:  # else the network will be another one by then
            self._within(captured, dense)
        return dense

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """See `CompressionCallback`."""
        captured = capture(trainer, pl_module, self.network, 1 if self.budget is None else self.samples)
        network = captured.network
        chosen, left = self.choose(network)
        if self.budget is None:
            self._found = {
                name: cluster(w, 2 ** self._bits(name), self.clustering, self.groups) for name, w in chosen.items()
            }
        else:
            self._found = self._within(captured, self.dense)
        left |= {name: "would save nothing, or is not needed" for name in chosen if name not in self._found}
        return captured, self.companions(network, {name: chosen[name] for name in self._found}), left

    @torch.no_grad()
    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        network = self.target(pl_module)
        parameters = dict(network.named_parameters())
        for name, (book, code) in self._found.items():
            kept = companion(network, name, "code")
            assert kept is not None
            kept.copy_(code)
            parameters[name].copy_(book[code.long()])
            for value in states_like(trainer.optimizers, parameters[name]):
                value.copy_(tie(value, code, len(book)))
        used = sum(len(book) - 1 for book, _ in self._found.values())
        rank_zero_info(f"WeightSharing: {len(self._found)} tensors share {used:,} values")
        self._found = {}
        self.changed()

    @torch.no_grad()
    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tie the gradients of weights that share a value."""
        network = self.target(pl_module)
        for (_, weight, code), count in zip(self.held(network), self._values(network), strict=True):
            if weight.grad is not None:
                weight.grad.copy_(tie(weight.grad, code, count, average=self.gradient == "mean"))

    # Weights and codes.

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """See `HeldWeights`."""
        return None if self.bits is None or self._bits(name) else "no pattern of `bits` matches it"

    def changed(self) -> None:
        """See `HeldWeights`."""
        super().changed()
        self._counts = []

    def hold(self, network: nn.Module) -> None:
        """See `HeldWeights`: the weights of a cluster have one value."""
        for (_, weight, code), count in zip(self.held(network), self._values(network), strict=True):
            settle(weight, code, count)

    def _values(self, network: nn.Module) -> list[int]:
        """How many values each tensor has, and zero."""
        if not self._counts:
            self._counts = [int(code.max()) + 1 for _, _, code in self.held(network)]
        return self._counts

    def _bits(self, name: str) -> int:
        if isinstance(self.bits, int):
            return self.bits
        return next((bits for pattern, bits in (self.bits or {}).items() if matches(name, pattern)), 0)

    def _within(self, captured: Captured, dense: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
        """Codebooks of as many bits as a budget of bytes allows, each layer by what its outputs lose."""
        assert self.budget is not None
        network, chosen = captured.network, self.choose(captured.network)[0]
        norms = input_norms(network, captured.calibration)
        rest = max(0.0, float(artifact_bytes(network) - sum(len(encode(weight)) for weight in chosen.values())))
        try:
            return share_within(chosen, norms, rest, self.budget.limits(dense)["bytes"], self.clustering, self.groups)
        except BudgetError as error:
            raise BudgetError(f"{error} by sharing weights") from error
