"""What a layer costs, read off its specification: candidates by the hundred, none of which is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_compress.edits import Spec
from lightning_compress.layers import Rotated
from lightning_compress.methods.geometry import Geometry

__all__ = ["Price", "price"]


@dataclass(frozen=True)
class Price:
    """What a layer costs.

    Attributes:
        macs: multiply-accumulates on one sample, in all of its calls.
        params: parameters.
    """

    macs: float
    params: int


def price(spec: Spec, places: Sequence[tuple[int, tuple[int, ...]]]) -> Price:
    """What the layer of a specification costs.

    Args:
        spec: the specification: plain layers, and containers of them.
        places: for each call on one sample, the number of inputs and their sides.

    Example:
        >>> from torch import nn
        >>> from lightning_compress.edits import describe
        >>> price(describe(nn.Conv2d(3, 8, 3, padding=1)), [(1, (10, 10))])
        Price(macs=21600.0, params=224)
    """
    return Price(sum(count * _macs(spec, size)[0] for count, size in places), _params(spec))


def _macs(spec: Spec, size: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Multiply-accumulates on one input of some sides, and the sides of its output."""
    kind = spec["type"]
    if kind == "Chain":
        total = 0.0
        for child in spec["layers"]:
            macs, size = _macs(child, size)
            total += macs
        return total, size
    if kind in ("Concat", "Sum"):
        branches = [_macs(child, size) for child in spec["layers"]]
        return sum(macs for macs, _ in branches), branches[0][1]
    geometry = _geometry(spec)
    if geometry is None:
        return 0.0, size
    after = geometry.output_size(size) if geometry.kernel else size
    return float(geometry.weights * math.prod(size if geometry.transposed else after)), after


def _params(spec: Spec) -> int:
    if "layers" in spec:
        return sum(_params(child) for child in spec["layers"])
    geometry = _geometry(spec)
    if geometry is None:
        return 2 * spec["num_features"] if spec.get("affine") else 0
    shared = Rotated.ROTATIONS if spec["type"] == "Rotated" else 1
    return geometry.weights // shared + (geometry.outputs if geometry.bias else 0)


def _geometry(spec: Spec) -> Geometry | None:
    if spec["type"] == "Rotated":
        return Geometry.from_spec({**spec, "type": "Conv2d", "padding_mode": "zeros"})
    return Geometry.from_spec(spec) if spec["type"] == "Linear" or spec["type"].startswith("Conv") else None
