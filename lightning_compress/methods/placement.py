"""Where a network is quantized: the weights, and the values between functions that a runtime keeps as integers.

One run shows which functions are called, on what. A runtime fuses a convolution or a linear layer with the BatchNorm
and the ReLU behind it, and rounds what comes out; so this, and nothing between, is what is rounded here. Additions,
concatenations, products and means of such values stay integers too; whatever moves values without changing them
(flatten, max pooling, chunks) goes on with the grid that they have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, resize_batch
from lightning_compress.edits import companion
from lightning_compress.methods.function_trace import Node, Site, Tracer
from lightning_compress.quantized import TRANSPOSED, WEIGHTED, using, watching
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["Pair", "Placement", "Site", "find_places"]

Argument = tuple[str, str, int, int]
"""The same, and which of the tensors that the function gets."""

PASSIVE = ("add", "cat", "mul", "mean", "avg_pool2d", "adaptive_avg_pool2d", "sigmoid")
"""Functions that a runtime carries out on integers, if they get some."""

FUSED = ("relu", "relu6", "hardtanh")
"""Functions that are carried out with the one before."""

TRANSPARENT = (
    *("max_pool1d", "max_pool2d", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"),
    *("chunk", "split", "getitem", "contiguous", "channel_shuffle", "dropout", "dropout2d", "pad", "unflatten"),
)
"""Functions whose values are values that they got, or zero."""


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which gets each channel of the first by itself, made no less than zero at most.

    Attributes:
        first: name of the weight whose outputs they are.
        second: name of the weight whose inputs they are.
        norm: path of the BatchNorm between.
        bias: name of what the first adds.
    """

    first: str
    second: str
    norm: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Placement:
    """What is rounded where.

    Attributes:
        scopes: paths of the modules that are watched.
        weights: names of the weights, in the order that data reaches them.
        values: sites whose results are rounded, in order.
        inputs: arguments that are rounded where they are used, for they come from outside.
        folded: path of a BatchNorm -> name of the weight that it is folded into.
        limits: site -> the largest value that the function before lets through (ReLU6).
        pairs: layers whose scales may be exchanged.
        left: name of a weight -> why it is not quantized.
        macs: name of a weight -> multiply-accumulates on one sample.
    """

    scopes: tuple[str, ...]
    weights: tuple[str, ...]
    values: tuple[Site, ...]
    inputs: tuple[Argument, ...]
    folded: Mapping[str, str]
    limits: Mapping[Site, float] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    macs: Mapping[str, float] = field(default_factory=dict)


def find_places(
    model: nn.Module, calls: Sequence[Call], exclude: Callable[[str], str | None] | None = None
) -> Placement:
    """Look at one run of a network.

    Args:
        model: the network; it is left as it was.
        calls: how it is called.
        exclude: name of a weight -> why it stays as it is, or None.
    """
    model_names = dict(model.named_modules())
    roots = {call.path for call in calls}
    scopes = [
        path
        for path, module in model_names.items()
        if path in roots or any(True for _ in module.children()) or module._parameters
    ]
    tracer = Tracer(model)
    with without_observers(model), undisturbed(model), watching(map(model.get_submodule, scopes)), using(tracer):
        for call in resize_batch(calls, 1):
            tracer.seen(call.tensors())
            tracer.ends(model.get_submodule(call.path)(*call.args, **call.kwargs))
    return _Placing(model, tracer, exclude or (lambda _: None)).place(tuple(scopes))


class _Placing:
    def __init__(self, model: nn.Module, tracer: Tracer, exclude: Callable[[str], str | None]) -> None:
        self.model, self.trace, self.exclude = model, tracer, exclude
        self.values: dict[Site, None] = {}
        self.inputs: dict[Argument, None] = {}
        self.folded: dict[str, str] = {}
        self.limits: dict[Site, float] = {}
        self.rounded: set[int] = set()

    def place(self, scopes: tuple[str, ...]) -> Placement:
        nodes = self.trace.nodes
        left = self._left()
        weighted = [
            node
            for node in nodes
            if node.weight is not None and node.weight not in left and node.site[1] not in TRANSPOSED
        ]
        for node in weighted:
            if node.site[1] != "linear" or not self._ends(node):
                self._round_end(node)
            self._round_input(node)
        for node in nodes:  # in order: what comes of integers is integers
            if node.site[1] in PASSIVE and any(self._is_rounded(value) for value in node.inputs):
                for value in node.inputs:
                    self._round(value, node)
                self._round_end(node)
        macs: dict[str, float] = defaultdict(float)
        for node in weighted:
            macs[str(node.weight)] += node.macs
        order = {site: place for place, site in enumerate(node.site for node in nodes)}
        return Placement(
            scopes,
            tuple(dict.fromkeys(str(node.weight) for node in weighted)),
            tuple(sorted(self.values, key=lambda site: order[site])),
            tuple(sorted(self.inputs, key=lambda argument: (order[argument[:3]], argument[3]))),
            self.folded,
            {site: limit for site, limit in self.limits.items() if site in self.values},
            tuple(self._pairs(weighted)),
            left,
            dict(macs),
        )

    # Which weights.

    def _left(self) -> dict[str, str]:
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        used: dict[str, set[str]] = defaultdict(set)
        for node in self.trace.nodes:
            if node.weight is not None:
                used[node.weight].add(node.site[1])
        left = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dim() < 2:
                continue
            reason = self._reason(name, parameter, names[id(parameter)], used.get(name, set()))
            if reason is not None:
                left[name] = reason
        return left

    def _reason(self, name: str, weight: Tensor, names: Sequence[str], used: set[str]) -> str | None:
        excluded = self.exclude(name)
        if excluded is not None:
            return excluded
        if not used:
            return "is no weight of a convolution or linear layer on the data"
        both = TRANSPOSED if used & set(WEIGHTED) else ()  # tied: one grid for what goes up and what goes down
        odd = sorted(used - set(WEIGHTED) - set(both))
        if odd:
            return f"is used by {odd[0]}, which runtimes do not carry out on integers"
        if len(names) > 1:
            return f"is tied to {names[1] if names[0] == name else names[0]}"
        if any(companion(self.model, name, role) is not None for role in ("code", "latent")):
            return "has shared or latent values, which another grid would undo"
        if not torch.isfinite(weight).all():
            return "has values that are not finite"
        return None

    # Which values.

    def _ends(self, node: Node) -> bool:
        value = self._end(node)[0]
        return value in self.trace.last and not self.trace.consumed[value]

    def _end(self, node: Node) -> tuple[int, list[Node]]:
        """The value at the end of what is carried out with a function, and that."""
        chain: list[Node] = []
        value = node.outputs[0]
        while value not in self.trace.last and len(self.trace.consumed[value]) == 1:
            after = self.trace.nodes[self.trace.consumed[value][0]]
            name = after.site[1]
            same_dim = node.site[1] != "linear" or node.rank == 2  # that the norm is over
            norm = name == "batch_norm" and not chain and node.weight is not None and same_dim and self._foldable(after)
            if not norm and (name not in FUSED or after.ceiling != after.ceiling):
                break
            chain.append(after)
            value = after.outputs[0]
        return value, chain

    def _foldable(self, node: Node) -> bool:
        norm = self.model.get_submodule(node.site[0])
        once = sum(other.site == node.site for other in self.trace.nodes) == 1
        return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None and once

    def _round_end(self, node: Node) -> None:
        value, chain = self._end(node)
        for after in chain:
            if after.site[1] == "batch_norm":
                self.folded[after.site[0]] = str(node.weight)
            if after.ceiling is not None:
                self.limits[after.site] = after.ceiling
        self._round(value, node)

    def _round_input(self, node: Node) -> None:
        if node.inputs:
            self._round(node.inputs[0], node)

    def _round(self, value: int, consumer: Node) -> None:
        """Let a value be rounded, where it is made; one from outside, where it is used."""
        number = self.trace.produced.get(value)
        node = None if number is None else self.trace.nodes[number]
        if node is None or not (node.single or node.site[1] in TRANSPARENT):
            for which, argument in enumerate(consumer.arguments):
                if argument == value:
                    self.inputs[(*consumer.site, which)] = None
            self.rounded.add(value)
            return
        if node.site[1] in TRANSPARENT and (node.inputs[0] in self.trace.produced or not node.single):
            self._round(node.inputs[0], node)
            self.rounded.add(value)
            return
        self._make(node.site, value)

    def _make(self, site: Site, value: int) -> None:
        self.values[site] = None
        self.rounded.add(value)

    def _is_rounded(self, value: int) -> bool:
        while value not in self.rounded:
            number = self.trace.produced.get(value)
            if number is None or self.trace.nodes[number].site[1] not in TRANSPARENT:
                return False
            value = self.trace.nodes[number].inputs[0]
        return True

    # Which layers may exchange scales.

    def _pairs(self, weighted: Sequence[Node]) -> list[Pair]:
        calls: dict[str, int] = defaultdict(int)
        for node in self.trace.nodes:  # of transposes, too: what is tied cannot be scaled for one use alone
            if node.weight is not None:
                calls[node.weight] += 1
        pairs = []
        for node in weighted:
            value, chain = self._end(node)
            consumers = self.trace.consumed[value]
            if len(consumers) != 1 or value in self.trace.last or calls[str(node.weight)] > 1:
                continue
            after = self.trace.nodes[consumers[0]]
            scalable = all(link.site[1] in ("batch_norm", "relu") for link in chain)
            if after.weight in calls and after in weighted and calls[str(after.weight)] == 1 and scalable:
                norm = next((link.site[0] for link in chain if link.site[1] == "batch_norm"), None)
                if norm is not None or node.bias != "":  # else what it adds could not be scaled
                    pairs.append(Pair(str(node.weight), str(after.weight), norm, node.bias))
        return pairs
