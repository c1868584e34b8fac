"""What a layer costs, read off its specification: candidates by the hundred, none of which is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_compress.edits import Spec
from lightning_compress.layers import Rotated
from lightning_compress.meter import COMPLEX, fft_macs
from lightning_compress.methods.geometry import Geometry
from lightning_compress.structured import by_fft

__all__ = ["Price", "price"]


THREE = 3
"""Real convolutions that torch makes of a complex one."""


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
    return Price(sum(_once(spec) + count * _macs(spec, size)[0] for count, size in places), _params(spec))


def _once(spec: Spec) -> float:
    """Multiply-accumulates on the weights themselves, in each call."""
    if "layers" in spec:
        return sum(_once(child) for child in spec["layers"])
    if not _transforms(spec):
        return 0.0
    return fft_macs(_params({**spec, "bias": False}), int(spec["block"]))


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
    if _transforms(spec):
        return _by_fft(spec, geometry, math.prod(size), math.prod(after)), after
    return float(geometry.weights * math.prod(size if geometry.transposed else after)), after


def _params(spec: Spec) -> int:
    if "layers" in spec:
        return sum(_params(child) for child in spec["layers"])
    geometry = _geometry(spec)
    if geometry is None:
        return 2 * spec["num_features"] if spec.get("affine") else 0
    weights = geometry.weights
    if spec["type"] == "Hashed":
        weights = spec["values"]
    elif spec["type"] == "Rotated":
        weights //= Rotated.ROTATIONS
    elif spec["type"] == "Circulant":
        weights //= spec["block"]
    return weights + (geometry.outputs if geometry.bias else 0)


def _geometry(spec: Spec) -> Geometry | None:
    if spec["type"] in ("Rotated", "Circulant", "Hashed"):
        sides = len(spec["kernel_size"])
        if not sides:
            return Geometry(spec["in_channels"], spec["out_channels"], bias=spec["bias"])
        return Geometry.from_spec({**spec, "type": f"Conv{sides}d", "padding_mode": "zeros"})
    return Geometry.from_spec(spec) if Geometry.fits(spec) else None


def _transforms(spec: Spec) -> bool:
    """Whether a layer computes by FFT."""
    if spec["type"] != "Circulant":
        return False
    return by_fft(spec["in_channels"], spec["out_channels"], spec["block"], spec["groups"])


def _by_fft(spec: Spec, geometry: Geometry, inputs: int, outputs: int) -> float:
    """Multiply-accumulates of a block-circulant layer on one input, by its places and those of the output."""
    block: int = spec["block"]
    transforms = fft_macs(geometry.inputs * inputs, block) + fft_macs(geometry.outputs * outputs, block)
    each = THREE if geometry.kernel else COMPLEX
    return transforms + each * (block // 2 + 1) * geometry.weights // block**2 * outputs
