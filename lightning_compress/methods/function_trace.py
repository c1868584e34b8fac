"""Which functions a network calls, on which values: one run, written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.quantized import Calls

__all__ = ["Node", "Site", "Tracer"]

Site = tuple[str, str, int]
"""Path of a module, name of a function, which of its calls."""


@dataclass
class Node:
    """A call of a function.

    Attributes:
        site: where.
        inputs: values that it gets.
        arguments: the value of each tensor among its arguments; None: a parameter or a constant.
        outputs: values that it returns.
        single: whether it returns a tensor, and not several.
        rank: dims of the first.
        weight: name of the parameter that it multiplies with.
        bias: name of the parameter that it adds; "": a tensor that is none.
        ceiling: the largest value that it lets through; not a number: it is no such function after all.
        macs: multiply-accumulates.
    """

    site: Site
    inputs: list[int]
    arguments: list[int | None]
    outputs: list[int]
    single: bool
    rank: int
    weight: str | None
    bias: str | None
    ceiling: float | None
    macs: float


class Tracer(Calls):
    """Writes down which functions are called, on which values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.last: set[int] = set()
        self.produced: dict[int, int] = {}
        self.consumed: dict[int, list[int]] = defaultdict(list)
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._count = 0
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._names = {id(p): name for name, p in model.named_parameters()}

    def seen(self, tensors: Sequence[Tensor]) -> None:
        """Values that come from outside."""
        for tensor in tensors:
            self._new(tensor)

    def ends(self, output: Any) -> None:
        """What the network returns."""
        self.last |= {self._values[id(t)] for t in pytree.tree_leaves(output) if id(t) in self._values}

    def call(
        self, module: nn.Module, place: tuple[str, int], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `Calls`."""
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        arguments = [self._values.get(id(leaf)) for leaf in leaves]
        inputs = [value for value in arguments if value is not None]
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        output = func(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if inputs and results:
            name = place[0]
            weighted = name.startswith("conv") or name == "linear"
            known = self._names.get(id(weight)) if weighted else None
            bias = args[2] if weighted and len(args) > 2 else None
            added = None if bias is None else self._names.get(id(bias), "")
            macs = results[0].numel() * weight[0].numel() if weighted and isinstance(weight, Tensor) else 0.0
            ceiling = None
            if name == "relu6":
                ceiling = 6.0
            elif name == "hardtanh":
                low, high = _bounds(args, kwargs)
                ceiling = high if low == 0.0 else float("nan")
            site = (self._paths[id(module)], *place)
            number = len(self.nodes)
            outputs, single = [self._new(tensor) for tensor in results], isinstance(output, Tensor)
            rank = results[0].dim()
            self.nodes.append(Node(site, inputs, arguments, outputs, single, rank, known, added, ceiling, float(macs)))
            for value in dict.fromkeys(inputs):
                self.consumed[value].append(number)
            for value in self.nodes[-1].outputs:
                self.produced[value] = number
        return output

    def _new(self, tensor: Tensor) -> int:
        self._alive.append(tensor)  # so that no other gets its id
        self._values[id(tensor)] = self._count
        self._count += 1
        return self._count - 1


def _bounds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    names = ("min_val", "max_val")
    given = dict(zip(names, (-1.0, 1.0), strict=True)) | dict(zip(names, args[1:3], strict=False))
    given |= {name: kwargs[name] for name in names if name in kwargs}
    return float(given["min_val"]), float(given["max_val"])
