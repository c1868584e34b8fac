"""Binary, ternary and softly clustered weights in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.artifact import artifact_bytes
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.callbacks.lending import Lending
from lightning_compress.callbacks.timing import milestones
from lightning_compress.edits import ROLES, Edit, companion
from lightning_compress.methods.calibration import first_and_last
from lightning_compress.methods.soft_kmeans import make_latent
from lightning_compress.optimizers import AroundSteps
from lightning_compress.schedule import SCHEDULES

__all__ = ["LowBitWeights"]

HARDEN = 0.8
"""Of training, after which soft values become hard, if nothing else is said: what is left lets the network settle."""


class LowBitWeights(HeldWeights):
    """Compute with weights of two, three or a few values from the start, and train the real ones that they come from.

    `weight` holds the values, and `weight_latent` beside it what is trained. The gradient is taken at the values; for
    the time of an optimizer's step the latents are in `weight`, and the step is theirs, with momentum, weight decay and
    clipping. Whatever else looks at the network, validation and checkpoints too, sees the values. The network is no
    faster; its file is smaller, since the artifact codes repeated values. Activations stay as they are.

    Args:
        kind: how values follow from latents. `binary`: signs times a fixed scale, BinaryConnect (Courbariaux et al.
            2015, arXiv 1511.00363). `xnor`: signs times their mean size, the weights of XNOR-Net (Rastegari et al.
            2016, arXiv 1603.05279). `ternary`: ternary weight networks (Li and Liu 2016, arXiv 1605.04711). `ttq`: two
            trained scales (Zhu et al. 2016, arXiv 1612.01064). `dkm`: differentiable k-means (Cho et al. 2021, arXiv
            2108.12659).
        granularity: what has a scale, `layer` or `channel` (of `xnor` and `ternary`); None: as in the kind's paper.
        bits: for `dkm`, logarithm of the number of values of a layer, from 1 to 4; None: 2.
        tau: for `dkm`, the temperature of the assignments, in standard deviations of the layer's weights; None: 0.05.
        start: when it begins: a float is a fraction of training, an integer an epoch.
        harden: for `dkm`, when soft values become hard ones, likewise; None: 0.8, or `start` if that is later. The last
            epoch is always hard, and validation and "best" forget what was before.
        ends: whether the first and the last layer take part. By default they stay as they are, as in the papers: they
            hold few of the weights, and much of the accuracy.
        exclude: patterns of parameter or module names that stay as they are.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range, or one that the kind does not have.

    Example:
        >>> LowBitWeights("quaternary")
        Traceback (most recent call last):
        ValueError: `kind` must be one of binary, xnor, ternary, ttq, dkm, got 'quaternary'; did you mean ...
    """

    role: ClassVar[str] = "latent"
    origin: ClassVar[str] = "low_bit_weights"

    def __init__(
        self,
        kind: str = "ternary",
        granularity: str | None = None,
        bits: int | None = None,
        tau: float | None = None,
        start: float | int = 0.0,
        harden: float | int | None = None,
        ends: bool = False,
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        self.lending = Lending(make_latent(kind, granularity, bits, tau))
        if harden is not None and kind != "dkm":
            raise ValueError(f"`harden` goes with kind='dkm', got harden={harden!r} with kind={kind!r}")
        if not isinstance(ends, bool):
            raise ValueError(f"`ends` must be true or false, got {ends!r}")
        steps, schedule = (2, "linear") if kind == "dkm" else (1, "one_shot")
        end = start if harden is None else harden  # by default put off when the Trainer's limits are known
        super().__init__(exclude=exclude, start=start, end=end, steps=steps, schedule=schedule, network=network)
        self.kind, self.harden, self.ends = kind, harden, ends
        self._outer: tuple[str, ...] | None = None  # the first and the last weight, once they are known
        self._chosen: tuple[str, ...] = ()
        self._amount = 0.0

    # What the base asks.

    @property
    def state_key(self) -> str:
        """See `CompressionCallback`; two kinds may share out a network."""
        return self._generate_state_key(kind=self.kind, exclude=self.exclude, start=self.start, network=self.network)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`; averages are refused.

        Raises:
            MisconfigurationException: there is a callback that averages weights.
        """
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if stage == "fit" and isinstance(other, WeightAveraging):
                raise MisconfigurationException(
                    f"{type(other).__name__} and LowBitWeights do not go together: the average of weights that have "
                    "few values has many. Leave one of them out"
                )

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """See `CompressionCallback`.

        Raises:
            MisconfigurationException: another callback works on the same weights.
        """
        captured = capture(trainer, pl_module, self.network)
        self._look(captured)
        weights = {id(weight): name for name, weight in self.require(captured.network).items()}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(other, HeldWeights) or other is self:
                continue
            if isinstance(other, LowBitWeights) and other._outer is None and not other.ends:
                continue  # which weights it takes is not known yet; it will ask for ours
            theirs = other.choose(other.target(pl_module))[0].values()
            both = [weights[id(weight)] for weight in theirs if id(weight) in weights]
            if both:
                raise MisconfigurationException(
                    f"{type(other).__name__} and LowBitWeights both decide on the values of {', '.join(both[:5])}"
                    f"{' and others' if len(both) > 5 else ''}: name these layers in `exclude` of one of them. For "
                    "weights that are pruned and have few values, use WeightPruning and WeightSharing"
                )
        return {"bytes": float(artifact_bytes(captured.network))}

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """See `CompressionCallback`: latents, and at the end of soft values nothing but that they become hard."""
        captured = capture(trainer, pl_module, self.network)
        self._amount, self._chosen = amount, ()
        if self.held(captured.network):
            return captured, (), {}
        self.lending.memory = {}
        self._look(captured)
        chosen, left = self.choose(captured.network)
        self._chosen = tuple(chosen)
        return captured, self.companions(captured.network, chosen), left

    @torch.no_grad()
    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        network = self.target(pl_module)
        self.changed()
        self.lending.begin(entry for entry in super().held(network) if entry[0] in self._chosen)
        self.lending.hard = self._amount >= 1.0
        self._chosen = ()
        self.changed()
        self.lending.settle(self.held(network))
        what = "hard" if self.kind == "dkm" and self.lending.hard else self.kind
        rank_zero_info(f"LowBitWeights: {len(self.lending.memory)} tensors are {what} from now on")

    # The life.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`.

        Raises:
            MisconfigurationException: scales are to be trained on gradients that only the optimizer unscales.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        fused = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
        if self.lending.kind.learns and scaler is not None and fused:
            raise MisconfigurationException(
                f"kind={self.kind!r} trains scales on the gradients, which a fused optimizer unscales out of sight: "
                "leave out fused=True, or use precision='bf16-mixed'"
            )
        if self.kind == "dkm" and self.harden is None:
            when = [milestones(trainer, v, v, 1, SCHEDULES["one_shot"])[0].at for v in (self.start, HARDEN)]
            early = self.start <= HARDEN if isinstance(self.start, float) else when[0] <= when[1]
            self.end = HARDEN if early else self.start
        super().on_train_start(trainer, pl_module)

    def watch(self, optimizer: Optimizer, network: nn.Module) -> AroundSteps:
        """See `HeldWeights`: for the time of a step the optimizer has the latents."""
        return AroundSteps(
            optimizer, lambda which: self.lending.lend(which, self.held(network)), lambda _: self.hold(network)
        )

    def hold(self, network: nn.Module) -> None:
        """See `HeldWeights`: what an optimizer was lent is taken back."""
        self.lending.take_back()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See `CompressionCallback`; a step that the user's code let fail is over."""
        for hook in self._hooks:
            hook.reset()
        self.lending.take_back()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before gradients are clipped: make those at the values into those at the latents."""
        self.lending.turn(optimizer, self.held(self.target(pl_module)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Before anyone saves what an error left behind."""
        self.lending.take_back()

    def after_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Latents were cut with their weights; what was written to these is taken back."""
        self.changed()
        self.lending.settle(self.held(self.target(pl_module)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training that ended early leaves hard values, too."""
        if not self.lending.hard:
            self.lending.hard = True
            self.lending.settle(self.held(self.target(pl_module)))
        super().on_train_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`."""
        self.lending.forget()
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, and the memories; latents are in the network."""
        return {**super().state_dict(), "memory": dict(self.lending.memory), "hard": self.lending.hard}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self.lending.memory, self.lending.hard = dict(state_dict["memory"]), state_dict["hard"]

    # Which weights.

    def choose(self, network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """See `HeldWeights`; weights that another method holds are left."""
        chosen, left = super().choose(network)
        for role in ROLES:
            if role != self.role:
                taken = [name for name in chosen if companion(network, name, role) is not None]
                left |= dict.fromkeys(taken, f"is pruned or shared already (it has a {role})")
                chosen = {name: weight for name, weight in chosen.items() if name not in taken}
        return chosen, left

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """See `HeldWeights`."""
        if weight.dtype != torch.float32:  # latents would lose their small steps
            return f"is {weight.dtype}, and latents train in float32: use precision='bf16-mixed' or '16-mixed'"
        if not self.ends and name in (self._outer or ()):
            return "is in the first or the last layer, which `ends` lets take part"
        return None

    def held(self, network: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        """See `HeldWeights`; of those that have latents, this callback's."""
        if self._held is None:
            self._held = [entry for entry in super().held(network) if entry[0] in self.lending.memory]
        return self._held

    def _look(self, captured: Captured) -> None:
        self._outer = ()
        if not self.ends:
            candidates = [name for name, weight in captured.network.named_parameters() if weight.dim() >= 2]
            self._outer = first_and_last(captured.network, candidates, captured.calls)
