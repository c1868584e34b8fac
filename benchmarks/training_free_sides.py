"""The sides of the training-free benchmark: what each makes of a trained network, and within which budget.

A side is an *operator* (a decomposition, or another kind of layer) and a *variant* (where the new weights come from).
Peers get what a careful user would give them: the rank that just meets the budget, found by bisection; layers that
would cost more than before stay as they are, and so does the first convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.training_free_nets import CALIBRATION, channels_last, in_chunks
from lightning_compress import Budget, CompactFilters, LowRankFactorization, measure
from lightning_compress.callbacks.replacement import LayerReplacement
from lightning_compress.methods.approximation import Init
from lightning_compress.methods.batchnorm import reestimate_batchnorm

__all__ = ["OPERATORS", "VARIANTS", "Compressed", "Operator", "compress", "compressing", "missing_peers", "variants_of"]

STEPS = 128  # fractions of the rank that the bisection tells apart

VARIANTS = {
    "data": "least squares on the data, layer after layer",
    "weights": "decomposed as it is, BatchNorm re-estimated",
    "uniform": "the same, each layer cut to the same share",
    "plain": "the same, BatchNorm as it was",
    "random": "random weights, BatchNorm re-estimated",
}


class UnreachableError(ValueError):
    """A budget that a peer cannot meet."""


@dataclass(frozen=True)
class Operator:
    """What takes the place of a layer.

    Attributes:
        kind: "low-rank" or "compact".
        name: as our function or the peer calls it.
        options: of our function.
        peer: the package that makes it; None: ours.
        budgets: whether it can be held to a budget of multiply-accumulates.
    """

    kind: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: str | None = None
    budgets: bool = True


OPERATORS = {
    "spatial": Operator("low-rank", "spatial"),
    "spatial, ranks of 16": Operator("low-rank", "spatial", {"round_to": 16}),
    "channel": Operator("low-rank", "channel"),
    "tucker": Operator("low-rank", "tucker"),
    "cp": Operator("low-rank", "cp"),
    "tensorly-torch tucker": Operator("low-rank", "tucker", peer="tltorch"),
    "tensorly-torch cp": Operator("low-rank", "cp", peer="tltorch"),
    "fasterai tucker": Operator("low-rank", "tucker", peer="fasterai"),
    "fasterai svd": Operator("low-rank", "svd", peer="fasterai"),
    "fasterai spatial": Operator("low-rank", "spatial", peer="fasterai"),
    "fasterai cp": Operator("low-rank", "cp", peer="fasterai"),
    "depthwise-separable": Operator("compact", "depthwise_separable", {"rank": 1}),
    "depthwise-separable, rank 2": Operator("compact", "depthwise_separable", {"rank": 2}),
    "ghost": Operator("compact", "ghost", {"ratio": 2}),
    "fire": Operator("compact", "fire"),
    "grouped + shuffle": Operator("compact", "grouped_shuffle", {"groups": 4}),
    "CReLU": Operator("compact", "crelu"),
    "rotated": Operator("compact", "rotated", budgets=False),  # it shares weights, and computes as much as before
}


def variants_of(operator: str) -> list[str]:
    """The variants that an operator has: peers decompose weights, compact filters have no ranks to share out."""
    found = OPERATORS[operator]
    if found.peer is not None:
        return ["uniform", "plain"]
    return ["data", "weights", *(["uniform"] if found.kind == "low-rank" else []), "random"]


def missing_peers() -> list[str]:
    """Peers that are not installed, by the names of their modules."""
    needed = {"tltorch": ("tltorch", "tensorly"), "fasterai": ("fasterai", "einops")}
    return [peer for peer, modules in needed.items() if any(find_spec(module) is None for module in modules)]


@dataclass(frozen=True)
class Compressed:
    """A network that was compressed.

    Attributes:
        net: the network, channels last.
        replaced: how many layers were replaced.
        left: layer -> why it was left as it was, where the side says so.
    """

    net: nn.Module
    replaced: int
    left: Mapping[str, str]


def compress(dense: nn.Module, operator: str, variant: str, budget: float | int | None, images: Tensor) -> Compressed:
    """Compress a copy of a trained network.

    Args:
        dense: the network; it stays as it is.
        operator: a key of `OPERATORS`.
        variant: a key of `VARIANTS`.
        budget: multiply-accumulates, as `Budget` takes them; None: whatever replacing every layer gives.
        images: calibration images, [N, C, H, W].

    Raises:
        ValueError: the budget cannot be met.
    """
    found, net = OPERATORS[operator], copy.deepcopy(dense).eval()
    if found.peer is None:
        return _ours(net, found, variant, budget, images)
    assert budget is not None
    net = (_tltorch if found.peer == "tltorch" else _fasterai)(net, found.name, float(budget), images[:1])
    net = channels_last(net.eval())
    if variant != "plain":
        reestimate_batchnorm(net, in_chunks(images))
    kept = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    convolutions = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    return Compressed(net, sum(name not in kept for name in convolutions), {})


def _ours(net: nn.Module, operator: Operator, variant: str, budget: float | int | None, images: Tensor) -> Compressed:
    limit = None if budget is None else Budget(macs=budget)
    options: dict[str, Any] = {
        **operator.options,
        "init": variant if variant in ("data", "random") else "weights",
        "calibration": None if variant == "plain" else in_chunks(images),
    }
    inputs = images[:2]
    if operator.kind == "low-rank":
        factorize = import_module("lightning_compress.methods.factorization").factorize
        options["allocation"] = "uniform" if variant in ("uniform", "plain") else "greedy"
        done = factorize(net, inputs, limit, decomposition=operator.name, **options)
    else:
        compact_filters = import_module("lightning_compress.methods.filters").compact_filters
        done = compact_filters(net, inputs, operator.name, budget=limit, **options)
    return Compressed(channels_last(net.eval()), len(done.errors), dict(done.left))


def compressing(operator: str, variant: str, budget: float | None) -> LayerReplacement:
    """The callback that does in a run what `compress` does; of our operators, and variants that are initialisations."""
    found = OPERATORS[operator]
    assert found.peer is None
    limit, init = None if budget is None else Budget(macs=budget), cast(Init, variant)
    common: dict[str, Any] = {"init": init, "samples": CALIBRATION}
    if found.kind == "low-rank":
        return LowRankFactorization(limit, decomposition=found.name, **found.options, **common)
    return CompactFilters(found.name, limit, options=found.options, **common)


def _candidates(net: nn.Module) -> list[str]:
    """The convolutions that peers are offered: all without groups but the first."""
    found = {
        name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1
    }
    return list(found)[1:]


def _fit(build: Callable[[float, Iterable[str]], nn.Module], net: nn.Module, budget: float, image: Tensor) -> float:
    """The largest fraction of the rank whose network meets the budget."""
    dense = measure(net, image)
    limit = budget * dense.macs if budget <= 1 else budget
    lowest = dense.macs

    def fits(step: int) -> bool:
        nonlocal lowest
        macs = measure(_cheaper(build, step / STEPS, net, image), image).macs
        lowest = min(lowest, macs)
        return macs <= limit

    if not fits(1):
        lowest_is = (
            "it decomposes none of these layers" if lowest == dense.macs else f"lowest {lowest / dense.macs:.3f}"
        )
        raise UnreachableError(lowest_is)
    low, high = 1, STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low / STEPS


def _cheaper(
    build: Callable[[float, Iterable[str]], nn.Module], fraction: float, net: nn.Module, image: Tensor
) -> nn.Module:
    """A network in which no layer costs more than it did."""
    before = measure(net, image).layers
    names = _candidates(net)
    after = measure(build(fraction, names), image).layers
    cost = {n: sum(macs for path, macs in after.items() if path == n or path.startswith(f"{n}.")) for n in names}
    return build(fraction, [name for name in names if cost[name] < before[name]])


def _tltorch(net: nn.Module, factorization: str, budget: float, image: Tensor) -> nn.Module:
    factorized = import_module("tltorch").FactorizedConv
    cp_rank = import_module("tensorly.cp_tensor").validate_cp_rank
    options: dict[str, Any] = {"fixed_rank_modes": "spatial"} if factorization == "tucker" else {}

    def build(fraction: float, names: Iterable[str], trained: bool = False) -> nn.Module:
        made = copy.deepcopy(net)
        for name in names:
            conv = made.get_submodule(name)
            rank: float | int = fraction
            if factorization == "cp":  # a fraction that rounds to rank 0 would raise
                rank = max(1, cp_rank(tuple(conv.weight.shape), rank=fraction))
            new = factorized.from_conv(
                conv,
                rank=rank,
                factorization=factorization,
                implementation="factorized",
                decompose_weights=trained,
                **options,
            )
            _put(made, name, new)
        return made

    torch.manual_seed(0)  # the alternating least squares start from random factors
    fraction = _fit(build, net, budget, image)
    return _cheaper(lambda f, names: build(f, names, trained=True), fraction, net, image)


def _fasterai(net: nn.Module, method: str, budget: float, image: Tensor) -> nn.Module:
    decomposer = import_module("fasterai.misc.conv_decomposer").Conv_Decomposer()

    def build(fraction: float, names: Iterable[str]) -> nn.Module:
        # without any name it would take "no choice" for "all layers"
        chosen = list(names) or ["none"]
        made: nn.Module = decomposer.decompose(net, percent_removed=1 - fraction, method=method, layers=chosen)
        return made

    return _cheaper(build, _fit(build, net, budget, image), net, image)


def _put(net: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)
