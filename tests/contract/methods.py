"""Every method, a row each: how to make its callbacks, and what it promises to leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch

from lightning_compress.budget import Budget
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.factorization import LowRankFactorization
from lightning_compress.callbacks.filters import CompactFilters
from lightning_compress.callbacks.latent import LowBitWeights
from lightning_compress.callbacks.pruning import ChannelPruning
from lightning_compress.callbacks.quantization import Quantization
from lightning_compress.callbacks.sharing import WeightSharing
from lightning_compress.callbacks.weights import WeightPruning
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD, FitNet
from tests.contract.nets import Plain


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        callbacks: makes the method's callbacks for a budget; edits before epochs 1 and 3 of 5.
        unit: what the budget is in.
        budget: the fraction that is asked for; None: the method makes nothing smaller.
        slack: how far below the budget it may end, in fractions of the dense network: its choices may be few.
        twice: the fraction that is asked for twice, one run after another.
        last: nothing may come after it, so that a second run is refused.
        renames: layers are replaced, so that tensors have other names.
    """

    callbacks: Callable[[Budget], list[L.Callback]]
    unit: str = "macs"
    budget: float | None = 0.5
    slack: float = 0.02
    twice: float = 0.7
    renames: bool = False
    last: bool = False

    def make(self, fraction: float | None = None) -> list[L.Callback]:
        """The callbacks, for the row's budget or another fraction of it."""
        return self.callbacks(Budget(**{self.unit: fraction or self.budget or 1.0}))


def _pruning(**options: object) -> Callable[[Budget], list[L.Callback]]:
    life: dict[str, object] = {"start": 1, "end": 3, "steps": 2, "samples": 32}
    return lambda budget: [ChannelPruning(budget, **{**life, **options})]  # type: ignore[arg-type]


def _low_rank(**options: object) -> Callable[[Budget], list[L.Callback]]:
    life: dict[str, object] = {"start": 1, "end": 3, "steps": 2, "schedule": "linear", "samples": 32, "round_to": 1}
    return lambda budget: [LowRankFactorization(budget, **{**life, **options})]  # type: ignore[arg-type]


def _compact(operator: str, **options: object) -> Callable[[Budget], list[L.Callback]]:
    life: dict[str, object] = {"start": 1, "end": 3, "steps": 2, "schedule": "linear", "samples": 32}
    return lambda budget: [CompactFilters(operator, budget, options, **life)]  # type: ignore[arg-type]


def _factorized_and_pruned(budget: Budget) -> list[L.Callback]:
    """Factorized first, then channels of what is left are cut, taught by the dense network."""
    first = LowRankFactorization(Budget(macs=0.8), samples=32, start=1, end=1)
    pruning = ChannelPruning(budget, start=3, end=3, steps=1, samples=32)
    return [Distillation("self", {"kd": KD(temperature=2.0)}, task_weight=0.5), first, pruning]


def _taught(budget: Budget) -> list[L.Callback]:
    """By another network; the hint needs a projector. All networks here have a `head`."""
    torch.manual_seed(7)
    hint = Term(FitNet(), weight=0.1, student="head", teacher="hidden")
    return [Distillation(Plain(), {"kd": KD(temperature=2.0), "hint": hint})]


def _taught_by_itself(budget: Budget) -> list[L.Callback]:
    losses = {"kd": KD(temperature=2.0), "hint": Term(FitNet(), student="head")}
    return [Distillation("self", losses, task_weight=0.5), *_pruning()(budget)]


METHODS: dict[str, Method] = {
    "channel_pruning": Method(_pruning()),
    "channel_pruning_taylor": Method(_pruning(criterion="taylor", floor=0.0), unit="params", budget=0.4),
    "channel_pruning_slimming": Method(
        _pruning(criterion="bn_scale", regularization="slimming", strength=1e-3, ranking="layer"), budget=0.6
    ),
    "channel_pruning_group_norm": Method(
        _pruning(regularization="group_norm", strength=1e-3, ranking="isomorphic", sensitivity=0.5), budget=0.6
    ),
    "channel_pruning_growing": Method(_pruning(regularization="growing"), unit="params"),
    "channel_pruning_self_distilled": Method(_taught_by_itself),
    "distillation": Method(_taught, budget=None),
    "weight_pruning": Method(lambda _: [WeightPruning(0.8, start=1, end=3, steps=2)], budget=None),
    "weight_pruning_grasp": Method(
        lambda _: [WeightPruning(0.8, "grasp", start=0.0, schedule="one_shot", samples=32)], budget=None
    ),
    "weight_sharing": Method(lambda _: [WeightSharing(4, start=2)], budget=None),
    "deep_compression": Method(
        lambda _: [Distillation("self"), WeightPruning(0.8, start=1, end=1, steps=1), WeightSharing(3, start=3)],
        budget=None,
    ),
    "low_bit_ternary": Method(lambda _: [LowBitWeights("ternary", start=1)], budget=None),
    "low_bit_dkm": Method(lambda _: [LowBitWeights("dkm", bits=2, start=1, harden=3)], budget=None),
    "low_bit_binary_then_pruning": Method(
        lambda _: [LowBitWeights("binary", start=1), *_pruning(start=2)(Budget(macs=0.6))], budget=None
    ),
    "quantization": Method(lambda _: [Quantization(start=1, samples=32)], budget=None),
    "quantization_low_bits": Method(
        lambda _: [Quantization(2, start=1, end=3, learn="lsq+", rounding="nearest", samples=32)], budget=None
    ),
    "quantization_pact": Method(
        lambda _: [Quantization(4, 4, start=2, learn="pact", freeze=0.3, target="gpu", samples=32)], budget=None
    ),
    "pruning_then_quantization": Method(
        lambda budget: [
            Distillation("self"),
            *_pruning(end=2)(budget),
            Quantization(start=3, samples=32, equalization=True),
        ],
        last=True,
    ),
    "low_rank": Method(_low_rank(), budget=0.6, renames=True),
    "low_rank_tucker": Method(_low_rank(decomposition="tucker"), budget=0.6, slack=0.06, renames=True),
    "low_rank_then_pruning": Method(_factorized_and_pruned, renames=True),
    "compact_filters": Method(
        _compact("depthwise_separable", rank=None), budget=0.7, slack=0.1, twice=0.85, renames=True
    ),
    "circulant": Method(_compact("circulant", block=2), unit="params", budget=0.6, slack=0.1, twice=0.85, renames=True),
    "hashed": Method(_compact("hashed", ratio=2), unit="params", budget=0.6, slack=0.1, twice=0.85, renames=True),
}

SCHEMES = (
    *("channel_pruning", "channel_pruning_self_distilled", "weight_pruning", "weight_sharing", "low_bit_ternary"),
    *("quantization", "low_rank", "compact_filters"),
)
"""One method of each scheme, for networks of other types."""
