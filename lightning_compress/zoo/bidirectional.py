"""Bi-directional networks: one set of filters carries images up to codes, and codes down to images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.tied import TiedConv2d
from lightning_compress.zoo.representations import LinearProbe, Representation, code_widths

__all__ = ["ConvolutionalDBN", "ConvolutionalRBM", "StackedConvAutoencoder", "TiedAutoencoder"]


class TiedAutoencoder(nn.Module):
    """A convolution, ReLU and max pooling up; the convolution's transpose down.

    Masci, Meier, Cirean and Schmidhuber, 'Stacked convolutional auto-encoders for hierarchical feature extraction',
    2011. Between the two directions only the filters are shared; each has a bias of its own.

    Args:
        in_channels: channels of the input.
        codes: channels of the code.
        kernel: side of the filters, odd.

    Raises:
        ValueError: an even kernel.

    Example:
        >>> layer, x = TiedAutoencoder(1, 16), torch.rand(2, 1, 8, 8)
        >>> layer(x).shape, layer.decode(layer(x)).shape
        (torch.Size([2, 16, 4, 4]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, in_channels: int, codes: int, kernel: int = 3) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd, so that codes lie on the pixels, got {kernel}")
        self.channels = in_channels  # as they were: a sum over those that are left, in the same units
        self.filters = TiedConv2d(in_channels, codes, kernel, padding=kernel // 2, bias=False)
        self.up_bias = nn.Parameter(torch.zeros(codes, 1, 1))
        self.down_bias = nn.Parameter(torch.zeros(in_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The code [N, codes, H / 2, W / 2] of an input [N, in_channels, H, W]."""
        return F.max_pool2d(F.relu(self.filters(x) + self.up_bias), 2)

    def loss(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Mean squared error of what was decoded for x: [N]."""
        squares: Tensor = (decoded - x).square().sum((1, 2, 3))
        return squares / (self.channels * x.shape[2] * x.shape[3])

    def decode(self, code: Tensor) -> Tensor:
        """What the code stands for, [N, in_channels, H, W]."""
        wide = F.interpolate(code, scale_factor=2.0)
        down: Tensor = self.filters(wide, transposed=True) + self.down_bias
        return down


class StackedConvAutoencoder(nn.Module):
    """Autoencoders with tied filters, each the input of the next; a linear probe classifies from the top codes.

    Each layer's loss is that of an autoencoder on what the layer below gives; the reconstruction goes all the way up
    and down. Jointly all layers learn from both; greedily (as in Masci et al. 2011, but at the same time) each learns
    from its own loss alone.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels; each layer halves them.
        codes: channels of each layer's code.
        width: factor on them.
        kernel: side of the filters.
        greedy: no gradient passes from a layer to another.
        probe: whether the classifier only reads; otherwise its loss trains the filters too.

    Raises:
        ValueError: no layers, or images that cannot be halved so often.

    Example:
        >>> net = StackedConvAutoencoder(image_size=8)
        >>> net(torch.rand(2, 1, 8, 8)).logits.shape, net.encode(torch.rand(2, 1, 8, 8)).shape
        (torch.Size([2, 10]), torch.Size([2, 64, 2, 2]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        *,
        codes: Sequence[int] = (32, 64),
        width: float = 1.0,
        kernel: int = 3,
        greedy: bool = False,
        probe: bool = True,
    ) -> None:
        super().__init__()
        wide = [in_channels, *code_widths(codes, width, image_size, len(codes))]
        self.greedy = greedy
        self.layers = nn.ModuleList(TiedAutoencoder(below, above, kernel) for below, above in pairwise(wide))
        self.probe = LinearProbe(wide[-1], image_size // 2 ** len(codes), num_classes, detached=probe)

    def forward(self, x: Tensor) -> Representation:
        """Of images [N, in_channels, H, W]."""
        losses = []
        code = image = x
        for layer in self._layers():
            below = code.detach()
            code = layer(below if self.greedy else code)
            image = layer.decode(code)
            losses.append(layer.loss(below, image))
        for layer in reversed(self._layers()[:-1]):  # from the top, which is decoded
            image = layer.decode(image)
        image = image.detach() if self.greedy else image
        active = code.gt(0).to(code.dtype).sum((1, 2, 3))
        return Representation(self.probe(code), image, torch.stack(losses, 1), active)

    def _layers(self) -> list[TiedAutoencoder]:
        return list(self.layers)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Tensor:
        """The top code of images."""
        for layer in self._layers():
            x = layer(x)
        return x


class ConvolutionalRBM(nn.Module):
    """A restricted Boltzmann machine with convolutional filters and probabilistic max pooling.

    Lee, Grosse, Ranganath and Ng, 'Convolutional deep belief networks for scalable unsupervised learning of
    hierarchical representations', 2009. In each 2 x 2 block of a channel at most one hidden unit is on; the pooled unit
    is on if one of them is. Filters convolve up, and their transpose gives the visible units back.

    Args:
        in_channels: channels of the visible units.
        codes: channels of the hidden units.
        kernel: side of the filters, odd.
        gaussian: visible units are real, with variance 1; otherwise probabilities.
        sparsity: share of hidden units that should be on; the loss draws their biases there.
        sampling: draw hidden units in training; otherwise, as in evaluation, take their probabilities (mean-field
            contrastive divergence, Welling and Hinton 2002).

    Raises:
        ValueError: an even kernel, or a sparsity that is no share.

    Example:
        >>> layer, x = ConvolutionalRBM(1, 16), torch.rand(2, 1, 8, 8)
        >>> layer(x).shape, layer.free_energy(x, layer.drive(x)).shape
        (torch.Size([2, 16, 4, 4]), torch.Size([2]))
    """

    def __init__(
        self,
        in_channels: int,
        codes: int,
        kernel: int = 3,
        gaussian: bool = True,
        sparsity: float = 0.03,
        sampling: bool = True,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd, so that hidden units lie on the pixels, got {kernel}")
        if not 0 < sparsity < 1:
            raise ValueError(f"`sparsity` must be a share of the hidden units, in (0, 1), got {sparsity}")
        self.gaussian, self.sparsity, self.sampling = gaussian, sparsity, sampling
        self.filters = TiedConv2d(in_channels, codes, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(self.filters.weight, std=0.1 / kernel)
        self.hidden_bias = nn.Parameter(torch.full((codes, 1, 1), -2.0))
        self.visible_bias = nn.Parameter(torch.zeros(in_channels, 1, 1))

    def forward(self, v: Tensor) -> Tensor:
        """Probabilities of the pooled units, [N, codes, H / 2, W / 2], given visible units [N, in_channels, H, W]."""
        return self.pooled(self.drive(v))

    def drive(self, v: Tensor) -> Tensor:
        """What visible units give each hidden one, [N, codes, H, W]: the log odds against an empty block."""
        drive: Tensor = self.filters(v) + self.hidden_bias
        return drive

    @staticmethod
    def pooled(drive: Tensor) -> Tensor:
        """Probabilities of the pooled units."""
        peak, total = _partition(drive)
        return 1 - (-peak).exp() / total

    @staticmethod
    def hidden(drive: Tensor) -> Tensor:
        """Probabilities of the hidden units."""
        peak, total = _partition(drive)
        return (drive - _spread(peak)).exp() / _spread(total)

    @staticmethod
    def shares(drive: Tensor) -> Tensor:
        """Probabilities of the hidden units if one of their block is on."""
        weight = (drive - _spread(F.max_pool2d(drive, 2))).exp()
        return weight / _spread(4 * F.avg_pool2d(weight, 2))

    def visible(self, h: Tensor) -> Tensor:
        """Means of the visible units, given hidden ones."""
        mean: Tensor = self.filters(h, transposed=True) + self.visible_bias
        return mean if self.gaussian else mean.sigmoid()

    def free_energy(self, v: Tensor, drive: Tensor) -> Tensor:
        """Of visible units and their drive, with the hidden ones summed out: [N]."""
        peak, total = _partition(drive)
        if self.gaussian:
            own = 0.5 * (v - self.visible_bias).square().sum((1, 2, 3))
        else:
            own = -(v * self.visible_bias).sum((1, 2, 3))
        return own - (peak + total.log()).sum((1, 2, 3))

    def loss(self, v: Tensor, drive: Tensor) -> Tensor:
        """Free energy of data over that of what one step of Gibbs sampling makes of it, per pixel: [N].

        Its gradient is the update of contrastive divergence (Hinton 2002): nothing flows through the sample. To it is
        added how far the mean activity of each channel is from `sparsity`, squared.

        Args:
            v: visible units.
            drive: theirs.
        """
        probabilities = self.hidden(drive)
        with torch.no_grad():
            h = self._sample(drive) if self.training and self.sampling else probabilities
            fantasy = self.visible(h)
        gap = self.free_energy(v, drive) - self.free_energy(fantasy, self.drive(fantasy))
        return gap / (v.shape[2] * v.shape[3]) + (probabilities.mean((2, 3)) - self.sparsity).square().sum(1)

    @staticmethod
    def _sample(drive: Tensor) -> Tensor:
        """Hidden units 0 or 1, at most one of them on in a block: where Gumbel noise puts the maximum."""
        # Drawing calls nothing that is rounded in a quantized network: evaluation, which does not draw, calls the same.
        noisy = drive - torch.empty_like(drive).exponential_().log()
        off = -torch.empty_like(drive[..., ::2, ::2]).exponential_().log()
        peak = torch.maximum(F.max_pool2d(noisy, 2), off)
        return (noisy == _spread(peak)).to(drive.dtype)


class ConvolutionalDBN(nn.Module):
    """A deep belief network of convolutional restricted Boltzmann machines; a linear probe classifies from its top.

    Lee et al. 2009. Each layer's visible units are the pooled units of the one below; on the way down a pooled unit
    turns on the hidden units of its block in the shares that the way up gave them. Trained by contrastive divergence,
    all layers at the same time, each on what the one below gives it.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels; each layer halves them.
        codes: channels of each layer's hidden units.
        width: factor on them.
        kernel: side of the filters.
        sparsity: share of hidden units that should be on.
        sampling: draw hidden units in training.
        probe: whether the classifier only reads; otherwise its loss trains the filters too.

    Raises:
        ValueError: no layers, or images that cannot be halved so often.

    Example:
        >>> net = ConvolutionalDBN(image_size=8)
        >>> net(torch.rand(2, 1, 8, 8)).losses.shape, net.encode(torch.rand(2, 1, 8, 8)).shape
        (torch.Size([2, 2]), torch.Size([2, 64, 2, 2]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        *,
        codes: Sequence[int] = (32, 64),
        width: float = 1.0,
        kernel: int = 3,
        sparsity: float = 0.03,
        sampling: bool = True,
        probe: bool = True,
    ) -> None:
        super().__init__()
        wide = [in_channels, *code_widths(codes, width, image_size, len(codes))]
        self.layers = nn.ModuleList(
            ConvolutionalRBM(below, above, kernel, number == 0, sparsity, sampling)
            for number, (below, above) in enumerate(pairwise(wide))
        )
        self.probe = LinearProbe(wide[-1], image_size // 2 ** len(codes), num_classes, detached=probe)

    def forward(self, x: Tensor) -> Representation:
        """Of images [N, in_channels, H, W]."""
        losses, shares = [], []
        code = x
        for layer in self._layers():
            below = code.detach()
            drive = layer.drive(below)
            losses.append(layer.loss(below, drive))
            if not self.probe.detached:  # the classifier's loss goes all the way down, the layers' own does not
                drive = layer.drive(code)
            shares.append(layer.shares(drive))
            code = layer.pooled(drive)
        image = code
        for layer, share in zip(reversed(self._layers()), reversed(shares), strict=True):
            image = layer.visible(_spread(image) * share)
        return Representation(self.probe(code), image, torch.stack(losses, 1), code.sum((1, 2, 3)))

    def _layers(self) -> list[ConvolutionalRBM]:
        return list(self.layers)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Tensor:
        """Probabilities of the top pooled units."""
        for layer in self._layers():
            x = layer(x)
        return x


def _partition(drive: Tensor) -> tuple[Tensor, Tensor]:
    """Of each 2 x 2 block: m and s so that log(1 + the sum of exp(drive)) = m + log s, without overflow."""
    peak = F.max_pool2d(drive, 2).clamp_min(0.0)
    return peak, 4 * F.avg_pool2d((drive - _spread(peak)).exp(), 2) + (-peak).exp()


def _spread(blocks: Tensor) -> Tensor:
    """To every unit what its block has."""
    return F.interpolate(blocks, scale_factor=2.0)
