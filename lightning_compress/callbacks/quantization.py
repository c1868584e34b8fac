"""Quantization in a Lightning run: after training, or from some epoch on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_compress.artifact import artifact_bytes
from lightning_compress.budget import Budget
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.capture import Captured, capture
from lightning_compress.callbacks.freezing import Freezing
from lightning_compress.callbacks.held import HeldWeights
from lightning_compress.callbacks.last import refuse_later, refuse_shared
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.edits import Edit, Quantize, history
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.posttraining import ORIGIN, Precision, Prepared, costs, places, prepare, regrid
from lightning_compress.methods.quantization import BITS, set_steps
from lightning_compress.methods.steps import RULES, StepTraining
from lightning_compress.methods.targets import TARGETS
from lightning_compress.quiet import without_observers
from lightning_compress.wording import require_choice

__all__ = ["Quantization"]


class Quantization(CompressionCallback):
    """Compute with integers: quantize the network after training, or train it quantized from some epoch on.

    From the edit on, weights and the values between layers are rounded where the runtime will round them, BatchNorm and
    ReLU included; training goes on straight through. The network in torch is no faster: `export` writes the file that
    is, ONNX with integer weights, and what that computes is what was trained. The artifact holds integers, too.

    Quantization comes last: after pruning, factorization, compact filters. Shared and latent weights stay as they are.

    Args:
        bits: of weights: 8, 4, 3 or 2; or pattern of parameter or module names -> bits, where the first that matches
            counts and weights that none matches get 8. Runtimes compute with 8 bits; fewer make the file smaller.
        value_bits: of the values between layers: 8 or 4.
        budget: of `bytes` or `bit_operations`: bits are shared out over weights instead.
        start: when it begins: a float is a fraction of training, an integer an epoch; 1.0: when training has ended, so
            that checkpoints hold the network as it was, and the report the quantized one.
        end: when weights have the bits that were asked for, likewise; None: at `start`. Between, they get fewer by and
            by, over the bits that there are.
        freeze: when steps are trained no more and BatchNorm computes with its running statistics, as it will in the
            end: a fraction of what is left of training after `end`. BatchNorm is frozen only where the learning rate
            has fallen to a fifth of its highest by then: without it, steps of full size would blow the network up.
        learn: what trains steps: `lsq` (Esser et al. 2020, arXiv 1902.08153), `lsq+` (and zero points, Bhalgat et al.
            2020, arXiv 2004.09576), `pact` (those of values, from what is clipped, Choi et al. 2018, arXiv
            1805.06085), `fixed` (nothing).
        step_lr: learning rate of the steps, in octaves for each step of Adam.
        observer: how the ranges of values are found first: `minmax`, `percentile`, `mse`, `entropy`.
        rounding: of weights, first: `nearest`; `corrected`, with corrected biases; `joint`, so that each layer's
            outputs differ least.
        equalization: exchange scales between layers first.
        ends: whether the first and the last layer take part in fewer bits than 8.
        target: the processor that it will run on: `avx2`, `vnni`, `arm`, `gpu`; None: this machine's. On processors
            without VNNI weights have 7 bits at most, because sums of 8-bit products would saturate there.
        samples: number of calibration samples.
        exclude: patterns of parameter or module names that stay as they are.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Quantization(bits=4, start=0.5).precision.bits
        4
        >>> Quantization(bits=7)
        Traceback (most recent call last):
        ValueError: `bits` must be one of 8, 4, 3, 2, got 7
    """

    settles_values: ClassVar[bool] = True  # a network that is quantized already goes on to be trained

    def __init__(
        self,
        bits: int | Mapping[str, int] = 8,
        value_bits: int = 8,
        budget: Budget | None = None,
        start: float | int = 0.5,
        end: float | int | None = None,
        freeze: float = 0.9,
        learn: str = "lsq",
        step_lr: float = 1e-3,
        observer: str = "mse",
        rounding: str = "joint",
        equalization: bool = False,
        ends: bool = False,
        target: str | None = None,
        samples: int = 256,
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        bits = dict(bits) if isinstance(bits, Mapping) else bits
        self.precision = Precision(
            bits, value_bits, ends, budget, observer, rounding, equalization, target, tuple(exclude)
        )
        self.budget = budget
        if end is not None and (not isinstance(bits, int) or bits == 8):
            raise ValueError(f"`end` goes with one number of bits below 8, got end={end!r} and bits={bits!r}")
        super().__init__(
            start=start,
            end=start if end is None else end,
            steps=1 if end is None else BITS.index(bits) + 1,
            schedule="linear" if end is not None else "one_shot",
            network=network,
        )
        if not isinstance(freeze, int | float) or isinstance(freeze, bool) or not 0 <= freeze <= 1:
            raise ValueError(f"`freeze` must be a fraction in [0, 1], got {freeze!r}")
        require_choice("learn", learn, RULES)
        if isinstance(step_lr, bool) or not isinstance(step_lr, int | float) or not 0 < step_lr <= 1:
            raise ValueError(f"`step_lr` must be in (0, 1], got {step_lr!r}")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"`samples` must be an integer of at least 1, got {samples!r}")
        self.freeze, self.learn, self.step_lr, self.samples = freeze, learn, step_lr, samples
        self.bits: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self._prepared: Prepared | None = None
        self._again: set[str] | None = None  # weights that are quantized already and get other grids
        self._training = StepTraining(learn, step_lr, {})
        self._resumed: dict[str, Any] = {}
        self._freezing = Freezing()

    @property
    def after_training(self) -> bool:
        """Whether the network is quantized when training has ended."""
        return isinstance(self.start, float) and self.start == 1.0

    # What the base asks.

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """See `CompressionCallback`.

        Raises:
            MisconfigurationException: there is nothing to quantize, or a pattern matches nothing.
        """
        captured = capture(trainer, pl_module, self.network, self.samples if self.budget is not None else 1)
        if any(isinstance(edit, Quantize) for edit in history(captured.network)):
            return {"bytes": float(artifact_bytes(captured.network))}
        try:
            placement = places(captured.network, captured.calls, self.precision)
        except ValueError as error:
            raise MisconfigurationException(f"Quantization: {error}") from error
        for other in _callbacks(trainer):
            if isinstance(other, HeldWeights):
                refuse_shared(other, captured.network, placement.weights)
        dense = costs(captured.network, placement)
        others = [c for c in _callbacks(trainer) if isinstance(c, CompressionCallback) and c is not self]
        if self.budget is not None and not others:  # else the network will be another one by then
            prepare(captured.network, captured.calibration, self.precision, dense)
        machine = self.precision.machine
        rank_zero_info(
            f"Quantization: {len(placement.weights)} weights, for {machine} ({TARGETS[machine].note})"
            + (f"; {len(placement.left)} stay as they are" if placement.left else "")
        )
        return dense

    def refuse_finished(self, network: nn.Module) -> None:
        """See `CompressionCallback`; a network that is quantized may be trained on."""

    def edit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, amount: float
    ) -> tuple[Captured, Sequence[Edit], Mapping[str, str]]:
        """See `CompressionCallback`."""
        captured = capture(trainer, pl_module, self.network, self.samples)
        quantized = [e for e in history(captured.network) if isinstance(e, Quantize) and e.origin == ORIGIN]
        self._again = None
        if quantized:
            grids = {name: grid for edit in quantized for name, grid in edit.weights.items()}
            now = Quantize(weights=grids, target=quantized[0].target, origin=ORIGIN)
            asked = self.precision.of(list(quantized[0].weights))
            self._again = set()
            if self.budget is not None:  # shared out by the run that quantized it
                return captured, [], {}
            least = self._least(amount) if self.steps > 1 else 0
            self.bits = {name: max(bits, least) for name, bits in asked.items()}
            step = regrid(now, self.bits)
            self._again = set(step.weights)
            return captured, [step] if step.weights else [], {}
        precision = self.precision
        if self.steps > 1:
            precision = Precision(**{**precision.__dict__, "bits": self._least(amount)})
        self._prepared = prepare(captured.network, captured.calibration, precision, self.dense)
        return captured, [self._prepared.edit], self._prepared.placement.left

    def edited(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        network = self.target(pl_module)
        if self._again is not None:
            again = self._again
            self._training.end()
            set_steps(network, only=lambda name: name in again)
        else:
            assert self._prepared is not None
            self._prepared.apply(network)
            self.bits, self.errors = dict(self._prepared.bits), dict(self._prepared.errors)
            self._training.limits = _limits(self._prepared)
            self._prepared = None
        if not self.after_training:
            self._training.begin(network)

    # The life.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`.

        Raises:
            MisconfigurationException: a report that would come before what it is to report.
        """
        super().setup(trainer, pl_module, stage)
        callbacks = _callbacks(trainer)
        early = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, CompressionReport)]
        if stage == "fit" and self.after_training and early:
            raise MisconfigurationException(
                "Quantization(start=1.0) quantizes when training has ended: name it before CompressionReport, which "
                "reports what there is then"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`.

        Raises:
            MisconfigurationException: another method edits the network later.
        """
        super().on_train_start(trainer, pl_module)
        for other in _callbacks(trainer):
            different = isinstance(other, Quantization) and other.network != self.network
            if isinstance(other, CompressionCallback) and other is not self and not (self.after_training or different):
                refuse_later(trainer, self, other)
        unit, last = self._milestones[-1].unit, self._milestones[-1].at
        total = trainer.max_epochs if unit == "epoch" else trainer.estimated_stepping_batches
        self._freezing.unit, self._freezing.at = unit, last + self.freeze * (float(total or 0) - last)
        if self.after_training:
            self._milestones = []
        network = self.target(pl_module)
        if any(isinstance(edit, Quantize) for edit in history(network)) and self._resumed:
            self._training.begin(network, self._resumed)
        self._resumed = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See `CompressionCallback`; and freeze what is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._freezing.due(trainer) or self.done < 1.0 or self.after_training:
            return
        if self._training.running:
            self._training.end()
        network = self.target(pl_module)
        folded = [path for e in history(network) if isinstance(e, Quantize) for path in e.folded]

        def estimate() -> None:
            captured = capture(trainer, pl_module, self.network, self.samples)
            with without_observers(network):
                reestimate_batchnorm(network, captured.calibration)

        self._freezing.hold(trainer, [network.get_submodule(path) for path in folded], estimate)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Train the steps."""
        self._training.step(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        super().on_train_end(trainer, pl_module)
        self._let_go()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize, if it was to be done after training; averages of weights are in the network by now."""
        if self.after_training and self.done < 1.0:
            pl_module.to(trainer.strategy.root_device)
            self.apply_edits(trainer, pl_module, 1.0)
            pl_module.cpu()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """There will be no teardown."""
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See `CompressionCallback`."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """What the base keeps, and how the training of steps stands."""
        return {
            **super().state_dict(),
            "bits": dict(self.bits),
            "errors": dict(self.errors),
            "limits": dict(self._training.limits),
            "training": self._training.state_dict(),
            "highest": self._freezing.highest,
            "frozen": self._freezing.begun,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self.bits, self.errors = dict(state_dict["bits"]), dict(state_dict["errors"])
        self._training.limits = dict(state_dict["limits"])
        self._resumed = state_dict["training"]
        self._freezing.highest, self._freezing.begun = state_dict["highest"], state_dict["frozen"]

    def _let_go(self) -> None:
        self._training.end()
        self._freezing.end()

    def _least(self, amount: float) -> int:
        """The fewest bits that a weight may have so far on the way."""
        asked = self.precision.bits
        assert isinstance(asked, int)
        way = BITS[: BITS.index(asked) + 1]
        return way[min(len(way) - 1, max(0, round(amount * len(way)) - 1))]


def _limits(prepared: Prepared) -> dict[str, float]:
    """The largest that steps may be, where a ReLU6 is left to the rounding."""
    limits = {}
    for (path, name, number), ceiling in prepared.placement.limits.items():
        grid = prepared.edit.values[path, name, number]
        limits[f"{path}.{name}_{number}_step".lstrip(".")] = ceiling / (grid.high - max(grid.low, 0))
    return limits


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]
