"""Pruning of single weights in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.budget import as_fraction
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.losses import visit_losses
from lightning_compress.callbacks.masked import MaskedWeights, Regrowth
from lightning_compress.callbacks.timing import progress
from lightning_compress.edits import ROLES, Edit, named_tensors
from lightning_compress.methods.calibration import input_norms
from lightning_compress.methods.grasp import hessian_gradient
from lightning_compress.methods.scoring import AT_START, CRITERIA, SIGNED, bury, gather, score
from lightning_compress.methods.semi_structured import sparse_layers
from lightning_compress.methods.sparsity import ALLOCATIONS, Pattern, make_masks, silence
from lightning_compress.wording import require_choice

__all__ = ["WeightPruning"]


class WeightPruning(MaskedWeights):
    """Set weights to zero during training, and hold them there, until a share of them is gone.

    Masks are part of the network's state: they are in checkpoints, and a resumed run has them at once. A pruned weight
    has no gradient and no momentum, and is zero after every step, whatever the optimizer does. The artifact holds the
    zeros entropy-coded, and no masks. Zeros by themselves make no network faster: for that prune channels, or use 2:4
    with a runtime that has kernels for it.

    Args:
        sparsity: share of the prunable weights (of at least two dims) that go; N:M patterns have their own.
        criterion: `magnitude` (Han et al. 2015, arXiv 1506.02626), `taylor` (Molchanov et al. 2019, arXiv 1906.10771),
            `movement` (Sanh et al. 2020, arXiv 2005.07683), `snip` (Lee et al. 2019, arXiv 1810.02340), `grasp` (Wang
            et al. 2020, arXiv 2002.07376), `wanda` (Sun et al. 2023, arXiv 2306.11695) or `random`; `snip` and `grasp`
            prune once, before the first step.
        pattern: `unstructured`, `kernel`, `block:AxB`, or N:M as `2:4`.
        allocation: `global`, `uniform`, `erk` (Evci et al. 2020, arXiv 1911.11134) or `lamp` (Lee et al. 2021, arXiv
            2010.07611).
        start: when the first weights go: a float is a fraction of training, an integer an epoch.
        end: when the last ones go, likewise; the rest of training recovers.
        steps: in how many steps.
        schedule: how the sparsity grows over them: `one_shot`, `linear`, `cubic` (Zhu and Gupta 2017, arXiv
            1710.01878).
        rewind: after each step set the weights that are left back to what they were when training began, as in the
            lottery ticket hypothesis (Frankle and Carbin 2018, arXiv 1803.03635); the optimizer forgets, too.
        regrow: share of the living weights that die and are replaced every `every` steps, between `start` and `end`, by
            those whose gradients are largest (RigL, Evci et al. 2020, arXiv 1911.11134); falls to 0 along a cosine.
        every: optimizer steps between two such exchanges.
        release: when the masks are lifted again and all weights train (dense-sparse-dense, Han et al. 2016, arXiv
            1607.04381): a fraction of training after `end`; None: never.
        floor: least share of each tensor that stays.
        exclude: patterns of parameter or module names that stay as they are.
        samples: number of training samples, for `wanda` and `grasp`.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> WeightPruning(0.9, pattern="4:2")
        Traceback (most recent call last):
        ValueError: `pattern` must be unstructured, kernel, block:AxB or N:M, e.g. 2:4, got '4:2'
    """

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
            require_choice(name, value, known)
        for name, share, top in (("sparsity", sparsity, 1), ("regrow", regrow, 1), ("floor", floor, 1)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < top:
                raise ValueError(f"`{name}` must be a share in [0, 1), e.g. 0.9, got {share!r}{as_fraction(share)}")
        if not sparsity:
            raise ValueError(f"`sparsity` must be above 0, e.g. 0.9, got {sparsity!r}")
        for name, count in (("every", every), ("samples", samples)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}")
        if release is not None and (not isinstance(release, float) or not 0 < release <= 1):
            raise ValueError(f"`release` must be a fraction of training in (0, 1], got {release!r}")
        if criterion in AT_START and (start != 0 or (steps > 1 and schedule != "one_shot")):
            raise ValueError(
                f"criterion={criterion!r} prunes once, before the first step: give start=0.0, schedule='one_shot'"
            )
        if criterion in SIGNED and allocation == "lamp":
            raise ValueError(f"allocation='lamp' compares sizes, and the scores of criterion={criterion!r} have signs")
        if criterion in ("taylor", "movement") and start == 0:
            raise ValueError(
                f"criterion={criterion!r} gathers gradients before the first edit: `start` must be after 0"
            )
        if regrow and self.pattern.name != "unstructured":
            raise ValueError(
                f"`regrow` goes with pattern='unstructured', got pattern={pattern!r}; leave out one of them"
            )
        if schedule == "one_shot":
            steps = self.steps = 1
        self.sparsity, self.criterion, self.allocation = float(sparsity), criterion, allocation
        self.rewind, self.release, self.regrowth = rewind, release, Regrowth(float(regrow), every, self.end)
        self.floor, self.samples = float(floor), samples
        self._gathered: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] = {}
        self._pending = False  # masks wait for the first gradients
        self._scores: dict[str, Tensor] = {}
        self._amount = 0.0

    # What the base asks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.criterion == "grasp" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "criterion='grasp' differentiates the loss that `training_step` returns, and "
                f"{type(pl_module).__name__} has automatic_optimization=False: use criterion='snip'"
            )

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
        if self.criterion == "grasp":
            products = hessian_gradient(chosen, lambda see: visit_losses(trainer, pl_module, self.samples, see))
            # Sums over a batch may differ in their last bits from rank to rank: it is rank 0's that count.
            self._gathered = trainer.strategy.broadcast({name: value.cpu() for name, value in products.items()})
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
        self.set_masks(trainer, network, masks)
        if self._amount >= 1.0:
            self._gathered = {}
        if self.rewind:
            self._go_back(trainer, network)

    def constrain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather gradients where the criterion needs them; take the gradients of dead weights away."""
        if self.lifted:
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
            self.set_masks(trainer, network, masks)
            self._pending = False
        if self.done >= 1.0 and self.regrowth.due(trainer):
            self.exchange(trainer, network, self.regrowth.now(trainer))
        silence((weight.grad for _, weight, _ in self.held(network)), self.graves(network))

    # The life.

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`; masks are lifted when it is time for that."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.release is not None and not self.lifted and progress(trainer) >= self.release:
            if self.done < 1.0:
                raise MisconfigurationException(
                    f"`release`={self.release} comes before the last weights have gone; let `release` be later, or "
                    "`end` earlier"
                )
            self.lifted = True
            rank_zero_info(f"WeightPruning: masks are lifted at epoch {trainer.current_epoch}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`; 2:4 is for kernels that not every machine has: say which layers have one here."""
        super().on_train_end(trainer, pl_module)
        if self.pattern.keep == (2, 4):
            reasons = sparse_layers(self.target(pl_module))
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            fast = sum(reason is None for reason in reasons.values())
            rank_zero_info(
                f"WeightPruning: {fast} of {len(reasons)} layers with 2:4 weights have sparse kernels here; "
                f"`use_sparse_kernels` puts them to use{f'. Dense: {why}' if why else ''}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, and what masks do not tell."""
        return {
            **super().state_dict(),
            "gathered": dict(self._gathered),
            "initial": dict(self._initial),
            "pending": self._pending,
            "released": self.lifted,
            "asked": [self.sparsity, self.pattern.name],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._gathered, self._initial = dict(state_dict["gathered"]), dict(state_dict["initial"])
        self._pending, self.lifted = state_dict["pending"], state_dict["released"]
        if state_dict["asked"] != [self.sparsity, self.pattern.name]:
            self.done, self._pending, self.lifted = 0.0, False, False  # what is due by now is still to be done

    # Weights and masks.

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """See `HeldWeights`."""
        return self.pattern.refuses(weight)

    def _score(self, name: str, weight: Tensor, norm: Tensor | None) -> Tensor:
        seed = sum(map(ord, name)) + int(1000 * self.done)  # another draw at each edit, the same on every rank
        try:
            return score(self.criterion, weight, norm, self._gathered.get(name), seed)
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error

    @torch.no_grad()
    def _go_back(self, trainer: pl.Trainer, network: nn.Module) -> None:
        for name, value in named_tensors(network):
            if name in self._initial and self._initial[name].shape == value.shape:
                value.copy_(self._initial[name])
        self.hold(network)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
