"""The layers that edits put in place of others: containers of ordinary layers, and what torch has no layer for.

They hold no code of any method. What a container computes is what its children compute, so a network that was edited
exports, compiles, prunes and trains as any other.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.tied import transpose, transpose_convolution

__all__ = ["Chain", "Concat", "Reorder", "Rotated", "Sum"]


class Chain(nn.Sequential):
    """Layers in a row that do the work of one.

    Args:
        layers: the layers.
        form: how they came about ("spatial", "depthwise_separable", ...): what their weights stand for together.

    Example:
        >>> Chain(nn.Linear(8, 2, bias=False), nn.Linear(2, 8), form="channel")(torch.zeros(1, 8)).shape
        torch.Size([1, 8])
    """

    def __init__(self, *layers: nn.Module, form: str = "") -> None:
        super().__init__(*layers)
        self.form = form

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """What the one layer gives; or its transpose, if that layer was a `TiedConv2d` and is called so."""
        if transposed:
            return self.transpose(x)
        for layer in self:
            x = layer(x)
        return x

    def transpose(self, z: Tensor) -> Tensor:
        """The transposes of the layers, the last one's first."""
        for layer in reversed(self):
            z = transpose(layer, z)
        return z

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"form={self.form!r}"


class Concat(nn.ModuleList):
    """Layers side by side on one input, their outputs joined along the channels.

    Example:
        >>> Concat([nn.Identity(), nn.Conv2d(4, 2, 1)])(torch.zeros(1, 4, 3, 3)).shape
        torch.Size([1, 6, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """From [N, C, ...] to [N, sum of the layers' channels, ...]."""
        return torch.cat([layer(x) for layer in self], 1)

    def transpose(self, z: Tensor) -> Tensor:
        """Each layer's transpose of its own channels, added."""
        widths = [getattr(layer, "out_channels", None) for layer in self]
        rest = z.shape[1] - sum(width for width in widths if width is not None)  # of the one that passes its input on
        parts = z.split([rest if width is None else width for width in widths], 1)
        first, *others = (transpose(layer, part) for layer, part in zip(self, parts, strict=True))
        return sum(others, first)


class Sum(nn.ModuleList):
    """Layers side by side on one input, their outputs added.

    Example:
        >>> Sum([nn.Identity(), nn.Conv2d(4, 4, 1)])(torch.zeros(1, 4, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """From [N, C, ...] to what each of the layers gives."""
        first, *rest = self
        total: Tensor = first(x)
        for layer in rest:
            total = total + layer(x)
        return total

    def transpose(self, z: Tensor) -> Tensor:
        """The layers' transposes, added."""
        first, *rest = (transpose(layer, z) for layer in self)
        return sum(rest, first)


class Reorder(nn.Module):
    """Channels in another order: output channel i is input channel `order[i]`.

    Args:
        channels: how many there are. The order itself is a buffer, and starts as it is.

    Example:
        >>> reorder = Reorder(3)
        >>> _ = reorder.order.copy_(torch.tensor([2, 0, 1]))
        >>> reorder(torch.tensor([[10, 11, 12]]))
        tensor([[12, 10, 11]])
    """

    order: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("order", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, ...] to the same shape."""
        return x.index_select(1, self.order)

    def transpose(self, z: Tensor) -> Tensor:
        """Back into the old order."""
        return z.index_select(1, self.order.argsort())

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return str(self.channels)


class Rotated(nn.Module):
    """A convolution whose filters come in fours: one kernel in its four rotations by 90 degrees.

    A quarter of the weights, and as many multiply-accumulates as before. The weight sharing of p4 group convolutions
    (Cohen and Welling 2016, arXiv 1602.07576) in the filters of one layer; outputs are ordered by rotation.

    Args:
        in_channels: channels in.
        out_channels: channels out, four for each kernel.
        kernel_size: a square's side, twice.
        stride: as for `nn.Conv2d`; so are the rest.
        padding: zeros around.
        dilation: likewise.
        groups: of channels; every group has its own kernels.
        bias: add one.

    Example:
        >>> layer = Rotated(4, 8, (3, 3), padding=(1, 1))
        >>> layer(torch.zeros(1, 4, 6, 6)).shape, layer.weight.shape
        (torch.Size([1, 8, 6, 6]), torch.Size([2, 4, 3, 3]))
    """

    ROTATIONS: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size[0] != kernel_size[1] or out_channels % (self.ROTATIONS * groups) or in_channels % groups:
            raise ValueError(
                f"rotated filters need square kernels and outputs in fours for each group, got kernel_size="
                f"{kernel_size}, out_channels={out_channels}, groups={groups}"
            )
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = nn.Parameter(torch.empty(out_channels // self.ROTATIONS, in_channels // groups, *kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        if not self.weight.is_meta:
            nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, H, W] to [N, out_channels, H', W']."""
        weight = self.rotate(self.weight, self.groups)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, z: Tensor) -> Tensor:
        """From [N, out_channels, H', W'] to [N, in_channels, H, W]."""
        return transpose_convolution(z, self.rotate(self.weight, self.groups), self)

    @classmethod
    def rotate(cls, kernels: Tensor, groups: int) -> Tensor:
        """All filters, [out, in / groups, k, k], of the kernels, [out / 4, in / groups, k, k]."""
        blocks = kernels.unflatten(0, (groups, -1))
        turned = [torch.rot90(blocks, turn, (-2, -1)) for turn in range(cls.ROTATIONS)]
        return torch.cat(turned, 1).flatten(0, 1)

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
