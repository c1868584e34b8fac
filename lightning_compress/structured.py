"""Layers whose weight is given by fewer numbers and a rule: block-circulant and hashed linear layers and convolutions.

Both equal a plain layer with the weight that `dense_weight` makes. Like the layers of `layers.py` they hold no code of
any method.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_compress.hashing import hash_codes
from lightning_compress.tied import transpose_convolution

__all__ = ["Circulant", "Hashed", "Structured", "by_fft", "unroll"]

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

FFT_BLOCK, FFT_CHANNELS = 8, 128
"""Blocks and channels (of a group, on both sides) from which the FFT is faster than the dense weight, on CPU cores."""


class Structured(nn.Module):
    """A linear layer, or a convolution with zeros around, whose weight is made of fewer numbers.

    Args:
        in_channels: channels (or features) in.
        out_channels: channels (or features) out.
        kernel_size: sides of the kernel; empty for a linear layer.
        stride: for each side; so are the rest. Empty: 1.
        padding: zeros around, or "same". Empty: none.
        dilation: between the kernel's taps. Empty: 1.
        groups: of channels.
        bias: add one.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...] = (),
        stride: tuple[int, ...] = (),
        padding: tuple[int, ...] | str = (),
        dilation: tuple[int, ...] = (),
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{groups} groups do not divide {in_channels} channels in and {out_channels} out")
        ones = (1,) * len(kernel_size)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding = stride or ones, padding or (0,) * len(kernel_size)
        self.dilation, self.groups = dilation or ones, groups
        self.register_parameter("weight", None)  # before the bias, as in torch's layers: optimizers go by the order
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight of the plain layer that this one equals, [out, in / groups, *kernel]."""

    def forward(self, x: Tensor) -> Tensor:
        """From [N, in_channels, *size] to [N, out_channels, *size']; of a linear layer from [..., in] to [..., out]."""
        return self.apply_weight(x, self.dense_weight(), self.bias)

    def transpose(self, z: Tensor) -> Tensor:
        """The transpose of the plain layer, without the bias."""
        weight = self.dense_weight()
        return transpose_convolution(z, weight, self) if self.kernel_size else F.linear(z, weight.T)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor:
        """What the plain layer with a weight gives."""
        if not self.kernel_size:
            return F.linear(x, weight, bias)
        convolve = _CONVOLVE[len(self.kernel_size)]
        y: Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups or self.groups)
        return y

    def reset_weight(self) -> None:
        """Draw new weights, so that the dense weight has the variance that torch gives linear layers; not on meta."""
        if not self.weight.is_meta:
            fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
            nn.init.normal_(self.weight, std=fan_in**-0.5)

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        kernel = f", kernel_size={self.kernel_size}, stride={self.stride}" if self.kernel_size else ""
        return f"{self.in_channels}, {self.out_channels}{kernel}, groups={self.groups}"


class Circulant(Structured):
    """A layer whose weight consists of circulant blocks: `block` times fewer numbers.

    Cheng et al. 2015, 'An exploration of parameter redundancy in deep networks with circulant projections' (arXiv
    1502.03436); in blocks: Ding et al. 2017, 'CirCNN' (arXiv 1708.08917). Inputs and outputs come in blocks; between
    two of them, at each tap of the kernel, is a circulant matrix, given by its first column: a convolution around a
    circle, which is a product of spectra. Where that is the faster way (`by_fft`), spectra of inputs and weights are
    made by real FFTs along the blocks, in single precision at least, and multiplied; elsewhere, and in what is
    exported, the dense weight is made and used. Both agree up to rounding.

    Args:
        in_channels: channels (or features) in, blocks of them for each group.
        out_channels: channels (or features) out, likewise.
        block: side of the circulant blocks.
        sizes: the other arguments of `Structured`.

    Raises:
        ValueError: channels that are no multiples of the block.

    Example:
        >>> layer = Circulant(8, 16, block=4, kernel_size=(3, 3), padding=(1, 1))
        >>> layer(torch.zeros(1, 8, 6, 6)).shape, layer.weight.shape, layer.dense_weight().shape
        (torch.Size([1, 16, 6, 6]), torch.Size([4, 2, 4, 3, 3]), torch.Size([16, 8, 3, 3]))
        >>> layer = Circulant(3, 3, block=3, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[[1.0, 2.0, 3.0]]]))
        >>> layer.dense_weight().tolist()
        [[1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]
    """

    def __init__(self, in_channels: int, out_channels: int, block: int, **sizes: Any) -> None:
        super().__init__(in_channels, out_channels, **sizes)
        inputs, outputs = in_channels // self.groups, out_channels // self.groups
        if block < 1 or inputs % block or outputs % block:
            raise ValueError(
                f"circulant blocks of {block} do not divide {inputs} channels in and {outputs} out of each group"
            )
        self.block, self.fast = block, by_fft(in_channels, out_channels, block, self.groups)
        self.weight = nn.Parameter(torch.empty(out_channels // block, inputs // block, block, *self.kernel_size))
        self.reset_weight()

    def dense_weight(self) -> Tensor:
        """See `Structured`."""
        return unroll(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """See `Structured`."""
        if not self.fast or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return super().forward(x)  # formats of exported networks know no complex numbers
        return self.spectral(x)

    def spectral(self, x: Tensor) -> Tensor:
        """What `forward` gives, by FFT."""
        half = x.dtype in (torch.float16, torch.bfloat16)  # there is no FFT of these
        inputs, weight = (x.float(), self.weight.float()) if half else (x, self.weight)
        spectra = torch.fft.rfft(weight, dim=2)  # [out / block, in / groups / block, frequencies, *kernel]
        if self.kernel_size:
            y = self._convolve(inputs, spectra)
        else:
            blocks = torch.fft.rfft(inputs.unflatten(-1, (-1, self.block))).movedim(-1, 0)
            product = blocks.reshape(len(blocks), -1, blocks.shape[-1]) @ spectra.permute(2, 1, 0)
            y = torch.fft.irfft(product.movedim(0, -1), n=self.block).reshape(*x.shape[:-1], -1)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).view(-1, *[1] * len(self.kernel_size))
        return y.to(x.dtype) if half else y

    def _convolve(self, x: Tensor, spectra: Tensor) -> Tensor:
        """Each frequency is a group, of complex channels, by itself."""
        alone = x.dim() == len(self.kernel_size) + 1  # without a batch
        blocks = (x[None] if alone else x).unflatten(1, (-1, self.block))
        inputs = torch.fft.rfft(blocks, dim=2).transpose(1, 2)
        frequencies = inputs.shape[1]
        kernels = spectra.movedim(2, 0).flatten(0, 1)
        product = self.apply_weight(inputs.flatten(1, 2), kernels, None, frequencies * self.groups)
        product = product.unflatten(1, (frequencies, -1)).transpose(1, 2)
        y: Tensor = torch.fft.irfft(product, n=self.block, dim=2).flatten(1, 2)
        return y.squeeze(0) if alone else y

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"{super().extra_repr()}, block={self.block}"


def by_fft(in_channels: int, out_channels: int, block: int, groups: int = 1) -> bool:
    """Whether a block-circulant layer computes by FFT: where that is faster, which is where it has fewer MACs, too."""
    power = block & (block - 1) == 0
    return power and block >= FFT_BLOCK and min(in_channels, out_channels) >= FFT_CHANNELS * groups


def unroll(vectors: Tensor) -> Tensor:
    """Circulant blocks from their first columns.

    Args:
        vectors: [outputs / block, inputs / block, block, *kernel].

    Returns:
        The matrix, [outputs, inputs, *kernel]: in each block, row r has in column c entry (r - c) mod block.
    """
    block = vectors.shape[2]
    twice = torch.cat([vectors, vectors], 2).flip(2)
    rows = [twice.narrow(2, block - 1 - row, block) for row in range(block)]  # faster than gathering by an index
    matrix: Tensor = torch.stack(rows, 1).flatten(2, 3).flatten(0, 1)
    return matrix


class Hashed(Structured):
    """A layer whose weights are drawn from a few values by a hash of where they are.

    HashedNets (Chen, Wilson, Tyree, Weinberger and Chen 2015, 'Compressing neural networks with the hashing trick',
    arXiv 1504.04788): weight i, counted row by row, is sign(i) * values[bucket(i)] (`hash_codes`). The hash is worked
    out, and in no file. It makes files small, and training's state; nothing is faster: the dense weight is made for
    each call, and an index of it is held in memory (int32, a buffer that is in no state dict).

    Args:
        in_channels: channels (or features) in.
        out_channels: channels (or features) out.
        values: how many values there are; the parameter `weight`.
        seed: of the hash.
        sizes: the other arguments of `Structured`.

    Raises:
        ValueError: no values, or more than there are weights.

    Example:
        >>> layer = Hashed(8, 16, values=36, kernel_size=(3, 3))
        >>> layer(torch.zeros(1, 8, 6, 6)).shape, layer.weight.shape, list(layer.state_dict())
        (torch.Size([1, 16, 4, 4]), torch.Size([36]), ['weight', 'bias'])
    """

    codes: Tensor

    def __init__(self, in_channels: int, out_channels: int, values: int, seed: int = 0, **sizes: Any) -> None:
        super().__init__(in_channels, out_channels, **sizes)
        shape = (out_channels, in_channels // self.groups, *self.kernel_size)
        if not 1 <= values <= math.prod(shape):
            raise ValueError(f"{values} values cannot stand for {math.prod(shape)} weights: give 1 to as many")
        self.values, self.seed = values, seed
        self.weight = nn.Parameter(torch.empty(values))
        self.register_buffer("codes", torch.empty(shape, dtype=torch.int32), persistent=False)
        self.derive()
        self.reset_weight()

    def derive(self) -> None:
        """Work out the hash anew; on tensors that hold values."""
        if not self.codes.is_meta and not isinstance(self.codes, FakeTensor):
            codes = torch.from_numpy(hash_codes(self.codes.numel(), self.values, self.seed))
            self.codes.copy_(codes.view(self.codes.shape))

    def dense_weight(self) -> Tensor:
        """See `Structured`."""
        both = torch.cat([self.weight, -self.weight])
        weight: Tensor = both.index_select(0, self.codes.flatten()).view(self.codes.shape)
        return weight

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"{super().extra_repr()}, values={self.values}, seed={self.seed}"
