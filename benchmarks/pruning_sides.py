"""The sides of the channel pruning benchmark: what each does to a dense network that is fine-tuned for some epochs.

Peers prune before the fine-tuning, those that learn sparsity after a share of its epochs, in small steps until the
budget is met, as Torch-Pruning's own reproduction of its paper does (`progressive_pruning`); that loop's global
ranking, step count and strengths of regularisation are taken over.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import lightning as L
from torch import Tensor, nn

from benchmarks.distillation_sides import KD_TASK, KD_TEMPERATURE, KD_WEIGHT
from lightning_compress import Budget, ChannelPruning, Distillation, measure
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD

__all__ = ["DENSE", "OURS", "PEERS", "SIDES", "THIN", "USUAL", "Learner", "Peer", "missing_peers", "prune_to"]

STEPS = 400  # of the way from nothing to everything


def _pruning(budget: float, steps: int, **options: Any) -> ChannelPruning:
    return ChannelPruning(Budget(macs=budget), end=0.0 if steps == 1 else 0.3, steps=steps, **options)


def _taught(budget: float, steps: int) -> list[L.Callback]:
    losses = {"kd": Term(KD(temperature=KD_TEMPERATURE), KD_WEIGHT)}
    return [Distillation("self", losses, task_weight=KD_TASK, metrics=False), _pruning(budget, steps)]


OURS: Mapping[str, Callable[[float], list[L.Callback]]] = {
    "ours": lambda budget: [_pruning(budget, 1)],
    "ours, in steps": lambda budget: [_pruning(budget, 5)],
    "ours, in steps + distillation": lambda budget: _taught(budget, 5),
    "ours, Taylor": lambda budget: [_pruning(budget, 5, criterion="taylor", start=0.05)],
}
"""Name -> callbacks for a budget. Steps are made in the first 0.3 of the epochs."""


@dataclass(frozen=True)
class Peer:
    """A pruner of another package.

    Attributes:
        package: what has to be installed.
        build: makes the pruner of a network, an image, and the layers that give the outputs.
        learns: whether it regularises in training before it prunes.
    """

    package: str
    build: Callable[[nn.Module, Tensor, list[nn.Module]], Any]
    learns: bool = False


def _torch_pruning(kind: str, importance: str, importance_options: dict[str, Any], **options: Any) -> Any:
    def build(net: nn.Module, image: Tensor, heads: list[nn.Module]) -> Any:
        import torch_pruning

        scores = getattr(torch_pruning.importance, importance)(**importance_options)
        return getattr(torch_pruning.pruner, kind)(
            net,
            image,
            importance=scores,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=heads,
            # The defaults are dicts shared by all pruners of a process: layers of earlier networks would stay in them.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            **options,
        )

    return build


def _fasterai(net: nn.Module, image: Tensor, heads: list[nn.Module]) -> Any:
    from fasterai.core.criteria import large_final
    from fasterai.prune.pruner import Pruner

    with contextlib.redirect_stdout(io.StringIO()):
        pruner = Pruner(
            net,
            1.0,
            "global",
            large_final,
            ignored_layers=heads,
            example_inputs=image,
            iterative_steps=STEPS,
            in_channel_groups={},
            out_channel_groups={},
        )
    return pruner.pruner


PEERS: Mapping[str, Peer] = {
    "Torch-Pruning magnitude": Peer(
        "torch_pruning", _torch_pruning("MagnitudePruner", "GroupMagnitudeImportance", {"p": 2})
    ),
    "Torch-Pruning BN scale": Peer(
        "torch_pruning", _torch_pruning("BNScalePruner", "BNScaleImportance", {}, reg=1e-5), learns=True
    ),
    "Torch-Pruning group norm": Peer(
        "torch_pruning",
        _torch_pruning("GroupNormPruner", "GroupMagnitudeImportance", {"p": 2, "normalizer": "max"}, reg=5e-4),
        learns=True,
    ),
    "fasterai": Peer("fasterai", _fasterai),
}

DENSE, THIN = "dense, trained on", "thin, from scratch"
SIDES = (DENSE, *OURS, *PEERS, THIN)
USUAL = (DENSE, "ours", *PEERS)
"""Those that run if nothing else is asked for."""


def missing_peers() -> set[str]:
    """Packages that are not installed."""
    return {peer.package for peer in PEERS.values() if find_spec(peer.package) is None}


def prune_to(pruner: Any, net: nn.Module, image: Tensor, macs: float) -> None:
    """Step a peer's pruner until the network costs no more.

    Raises:
        ValueError: it has made all its steps before.
    """
    for _ in range(STEPS):
        if measure(net, image).macs <= macs:
            return
        pruner.step()
    if measure(net, image).macs > macs:
        raise ValueError(f"after {STEPS} steps {measure(net, image).macs:,} multiply-accumulates are left")


class Learner(L.Callback):
    """Lets a peer's pruner add its regularisation to the gradients, as its documentation says."""

    def __init__(self, pruner: Any) -> None:
        self.pruner = pruner

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the groups of channels once an epoch."""
        self.pruner.update_regularizer()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """After the backward pass."""
        self.pruner.regularize(pl_module.net)
