"""One form for every layer that is a matrix on patches: linear layers, convolutions, transposed convolutions.

In this form a weight is [G, O, C, *k]: groups, outputs of a group, inputs of a group, kernel; and the layer is, group
by group, a matrix [O, C * prod(k)] on the columns of *patches* of its input. A transposed convolution is one with the
kernel flipped, on the input with zeros between its pixels. What is solved for and decomposed is in this form; layers
of torch are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.edits import Spec, describe

__all__ = ["Geometry", "weight_of"]

CHUNK = 1 << 19
"""Most elements of the patches that are made at once: 4 MB in double precision."""


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weight of a plain layer."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


@dataclass(frozen=True)
class Geometry:
    """A layer without its weights.

    Attributes:
        inputs: channels (or features) in.
        outputs: channels (or features) out.
        kernel: sides of the kernel; empty for a linear layer.
        stride: for each side; so are the rest.
        padding: on both ends of each side, or "same".
        dilation: between the kernel's taps.
        output_padding: of a transposed convolution.
        groups: of channels.
        transposed: whether it is a transposed convolution.
        padding_mode: torch's name.
        bias: whether it adds one.

    Example:
        >>> import torch
        >>> geometry = Geometry.of(nn.Conv2d(4, 6, 3, stride=2, groups=2))
        >>> geometry.matrix, geometry.canonical(torch.zeros(6, 2, 3, 3)).shape
        ((2, 3, 18), torch.Size([2, 3, 2, 3, 3]))
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    padding_mode: str = "zeros"
    bias: bool = True

    @classmethod
    def of(cls, module: nn.Module) -> Geometry | None:
        """The geometry of a plain layer; None for any other module, a subclass of torch's included but `TiedConv2d`."""
        spec = describe(module)
        return None if spec is None or not cls.fits(spec) else cls.from_spec(spec)

    @staticmethod
    def fits(spec: Spec) -> bool:
        """Whether a specification is of a plain layer."""
        kind: str = spec["type"]
        return kind in ("Linear", "TiedConv2d") or kind.startswith("Conv")

    @classmethod
    def from_spec(cls, spec: Spec) -> Geometry:
        """The inverse of `spec`."""
        if spec["type"] == "Linear":
            return cls(spec["in_features"], spec["out_features"], bias=spec["bias"])
        padding = spec["padding"]
        return cls(
            spec["in_channels"],
            spec["out_channels"],
            spec["kernel_size"],
            spec["stride"],
            (0,) * len(spec["kernel_size"]) if padding == "valid" else padding,
            spec["dilation"],
            spec.get("output_padding", (0,) * len(spec["kernel_size"])),
            spec["groups"],
            spec["type"].startswith("ConvTranspose"),
            spec["padding_mode"],
            spec["bias"],
        )

    @property
    def spec(self) -> Spec:
        """The layer as an edit has it."""
        if not self.kernel:
            return {"type": "Linear", "in_features": self.inputs, "out_features": self.outputs, "bias": self.bias}
        spec: dict[str, Any] = {
            "type": f"Conv{'Transpose' if self.transposed else ''}{len(self.kernel)}d",
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        return {**spec, **({"output_padding": self.output_padding} if self.transposed else {}), "bias": self.bias}

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Groups, outputs of a group, and rows of a patch."""
        return self.groups, self.outputs // self.groups, self.inputs // self.groups * math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight in canonical form: [G, O, C, *k]."""
        return self.groups, self.outputs // self.groups, self.inputs // self.groups, *self.kernel

    @property
    def weights(self) -> int:
        """How many weights the layer has, without the bias."""
        return math.prod(self.shape)

    @property
    def pointwise(self) -> bool:
        """Whether its kernel is a single tap (and its padding adds nothing)."""
        return all(side == 1 for side in self.kernel) and not (isinstance(self.padding, tuple) and any(self.padding))

    # Layers with the same stride, padding and dilation, or with some of them.

    def like(
        self, inputs: int, outputs: int, groups: int, axes: Sequence[int] | None = None, bias: bool = False
    ) -> Geometry:
        """A layer with this kernel along `axes` (by default all), and a single tap along the others."""
        here = set(range(len(self.kernel)) if axes is None else axes)

        def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if axis in here else other for axis, value in enumerate(values))

        return replace(
            self,
            inputs=inputs,
            outputs=outputs,
            kernel=pick(self.kernel, 1),
            stride=pick(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else pick(self.padding, 0),
            dilation=pick(self.dilation, 1),
            output_padding=pick(self.output_padding, 0),
            groups=groups,
            bias=bias,
        )

    def point(self, inputs: int, outputs: int, groups: int = 1, bias: bool = False) -> Geometry:
        """A layer with a single tap and stride 1: a linear layer where this is one."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return Geometry(inputs, outputs, ones, ones, zeros, ones, zeros, groups, bias=bias)

    # Weights.

    def canonical(self, weight: Tensor) -> Tensor:
        """A layer's weight in canonical form, [G, O, C, *k]."""
        blocks = weight.reshape(self.groups, -1, *weight.shape[1:])
        if not self.transposed:
            return blocks
        blocks = blocks.transpose(1, 2)
        return blocks.flip(tuple(range(3, blocks.dim()))) if self.kernel else blocks

    def native(self, weight: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        if not self.transposed:
            return weight.flatten(0, 1)
        return weight.flip(tuple(range(3, weight.dim()))).transpose(1, 2).flatten(0, 1)

    # Data.

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Sides of the output for sides of the input."""
        sides = []
        for axis, side in enumerate(size):
            span = self.dilation[axis] * (self.kernel[axis] - 1)
            low, high = self._pads(axis)
            if self.transposed:
                sides.append((side - 1) * self.stride[axis] - low - high + span + 1 + self.output_padding[axis])
            else:
                sides.append((side + low + high - span - 1) // self.stride[axis] + 1)
        return tuple(sides)

    def columns(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches of an input and the outputs that belong to them, as columns, a bounded number at a time.

        Args:
            x: input, [N, C, *size], or [..., C] of a linear layer.
            y: output, [N, O, *size'], or [..., O].

        Yields:
            Patches [G, C / G * prod(k), n] and outputs [G, O / G, n], in double precision.
        """
        groups = self.groups
        if not self.kernel:
            rows = zip(self._chunks(x.reshape(-1, x.shape[-1])), self._chunks(y.reshape(-1, y.shape[-1])), strict=True)
            yield from ((a.T.double()[None], b.T.double()[None]) for a, b in rows)
            return
        if x.dim() == len(self.kernel) + 1:  # without a batch
            x, y = x[None], y[None]
        sides = len(self.kernel)
        windows = self._windows(x)
        row = self.inputs * math.prod(self.kernel)
        plane = math.prod(y.shape[3:])
        lines = max(1, CHUNK // (row * plane))  # of the first side
        samples = max(1, CHUNK // (row * plane * y.shape[2])) if lines >= y.shape[2] else 1
        order = (1, *range(2 + sides, 2 + 2 * sides), 0, *range(2, 2 + sides))
        for first in range(0, len(x), samples):
            for line in range(0, y.shape[2], lines):
                part = windows[first : first + samples, :, line : line + lines]
                target = y[first : first + samples, :, line : line + lines]
                patches = part.permute(order).reshape(groups, row // groups, -1)
                yield patches.double(), target.transpose(0, 1).reshape(groups, self.outputs // groups, -1).double()

    def _chunks(self, rows: Tensor) -> Sequence[Tensor]:
        chunks: Sequence[Tensor] = rows.split(max(1, CHUNK // max(self.inputs, self.outputs)))
        return chunks

    def _windows(self, x: Tensor) -> Tensor:
        """A view of the padded input, [N, C, *size', *k]."""
        if self.transposed:
            x = self._spread(x)
        else:
            pads = [amount for axis in reversed(range(len(self.kernel))) for amount in self._pads(axis)]
            x = F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        for axis, side in enumerate(self.kernel):
            span = self.dilation[axis] * (side - 1) + 1
            x = x.unfold(2 + axis, span, 1 if self.transposed else self.stride[axis])
            x = x[..., :: self.dilation[axis]]
        return x

    def _spread(self, x: Tensor) -> Tensor:
        """The input of a transposed convolution with zeros between its pixels, and around it or cut off there."""
        size = [(side - 1) * stride + 1 for side, stride in zip(x.shape[2:], self.stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *size)
        places: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in self.stride))
        wide[places] = x
        pads: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            low, high = self._pads(axis)
            span = self.dilation[axis] * (self.kernel[axis] - 1)
            pads += [span - low, span - high + self.output_padding[axis]]
        return F.pad(wide, pads)

    def _pads(self, axis: int) -> tuple[int, int]:
        if isinstance(self.padding, str):
            total = self.dilation[axis] * (self.kernel[axis] - 1)
            return total // 2, total - total // 2
        return self.padding[axis], self.padding[axis]
