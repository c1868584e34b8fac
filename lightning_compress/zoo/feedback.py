"""Feed-back networks: what they see is inferred by a loop that predicts the input from the code, and mends the code.

Both are unrolled for a fixed number of steps, so that they train, export and compress as any other network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.tied import TiedConv2d
from lightning_compress.zoo.feedforward.parts import scaled
from lightning_compress.zoo.representations import LinearProbe, Representation, code_widths

__all__ = ["DeconvolutionalNetwork", "HierarchicalSparseCoding", "SparseCoding"]


class SparseCoding(nn.Module):
    """Convolutional sparse coding: codes that are not negative, mostly zero, and deconvolve to the input.

    Inference lowers `|x - D z|^2 / 2 + penalty |z|_1` by proximal gradient steps (ISTA; with `accelerated`, FISTA: Beck
    and Teboulle 2009) in which one filter tensor deconvolves, to predict, and convolves, to carry the error back. Step
    sizes and thresholds are learned, as in LISTA (Gregor and LeCun 2010); the filters are not untied as there.

    Args:
        in_channels: channels of the input.
        codes: channels of the code.
        kernel: side of the filters, odd.
        iterations: steps of inference.
        penalty: on the codes, in the loss; thresholds start there.
        accelerated: go on from a point ahead of the last step.

    Raises:
        ValueError: an even kernel, or no iterations.

    Example:
        >>> layer = SparseCoding(1, 16, kernel=5)
        >>> layer(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        codes: int,
        kernel: int = 3,
        iterations: int = 4,
        penalty: float = 0.1,
        accelerated: bool = True,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd, so that codes lie on the pixels, got {kernel}")
        if iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {iterations}")
        if not penalty >= 0:
            raise ValueError(f"`penalty` must be at least 0, got {penalty}")
        self.iterations, self.penalty, self.accelerated = iterations, penalty, accelerated
        self.filters = TiedConv2d(in_channels, codes, kernel, padding=kernel // 2, bias=False)
        with torch.no_grad():
            norms = self.filters.weight.flatten(1).norm(dim=1)
            self.filters.weight /= norms.view(-1, 1, 1, 1)
        self.threshold = nn.Parameter(torch.full((codes, 1, 1), penalty))
        # the largest step that surely converges is 1 over the largest eigenvalue of the filters and back
        self.log_step = nn.Parameter(torch.full((iterations,), -math.log(_largest_eigenvalue(self.filters))))

    def forward(self, x: Tensor) -> Tensor:
        """The code [N, codes, H, W] of an input [N, in_channels, H, W]."""
        steps = self.log_step.exp()
        code = ahead = F.relu(steps[0] * (self.filters(x) - self.threshold))  # the first step starts from zero
        inertia = 1.0
        for step in steps[1:]:
            error = x - self.predict(ahead)
            new = F.relu(ahead + step * (self.filters(error) - self.threshold))
            following = (1 + math.sqrt(1 + 4 * inertia**2)) / 2
            ahead = new + (inertia - 1) / following * (new - code) if self.accelerated else new
            code, inertia = new, following
        return code

    def predict(self, code: Tensor) -> Tensor:
        """The input that a code stands for, [N, in_channels, H, W]."""
        predicted: Tensor = self.filters(code, transposed=True)
        return predicted

    def loss(self, x: Tensor, code: Tensor, predicted: Tensor) -> Tensor:
        """What inference makes small, of an input, its code and what that predicts; per pixel of the input: [N]."""
        error = x - predicted
        energy: Tensor = 0.5 * error.square().sum((1, 2, 3)) + self.penalty * code.abs().sum((1, 2, 3))
        return energy / (x.shape[2] * x.shape[3])


class DeconvolutionalNetwork(nn.Module):
    """Layers of convolutional sparse coding with max pooling between, each the input of the next.

    Zeiler, Krishnan, Taylor and Fergus, 'Deconvolutional networks', 2010; pooling remembers where its maxima were, and
    the way down puts them back there (the switches of Zeiler, Taylor and Fergus 2011). Trained by reconstruction and
    sparsity, greedily (each layer by its own loss, all at the same time) or jointly; a linear probe classifies from the
    top codes.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels; pooling halves them once less than there are layers.
        codes: channels of each layer's code.
        width: factor on them.
        kernel: side of the filters.
        iterations: steps of inference in each layer.
        penalty: on the codes.
        greedy: no gradient passes from a layer to another.
        probe: whether the classifier only reads; otherwise its loss trains the filters too.

    Raises:
        ValueError: no layers, or images that cannot be halved so often.

    Example:
        >>> net = DeconvolutionalNetwork(image_size=8, codes=(16, 32))
        >>> net(torch.rand(2, 1, 8, 8)).reconstruction.shape, net.encode(torch.rand(2, 1, 8, 8)).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 32, 4, 4]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        *,
        codes: Sequence[int] = (24, 48),
        width: float = 1.0,
        kernel: int = 3,
        iterations: int = 4,
        penalty: float = 0.02,
        greedy: bool = True,
        probe: bool = True,
    ) -> None:
        super().__init__()
        halvings = len(codes) - 1
        wide = [in_channels, *code_widths(codes, width, image_size, halvings)]
        self.greedy = greedy
        self.layers = nn.ModuleList(
            SparseCoding(below, above, kernel, iterations, penalty) for below, above in pairwise(wide)
        )
        self.probe = LinearProbe(wide[-1], image_size // 2**halvings, num_classes, detached=probe, pooled=True)

    def forward(self, x: Tensor) -> Representation:
        """Of images [N, in_channels, H, W]."""
        losses, switches, sizes = [], [], []
        code = image = x
        for number, layer in enumerate(self._layers()):
            if number:
                sizes.append(code.shape[2:])
                code, where = F.max_pool2d(code, 2, return_indices=True)
                switches.append(where)
            below, code = code.detach(), layer(code.detach() if self.greedy else code)
            image = layer.predict(code)
            losses.append(layer.loss(below, code, image))
        for layer in reversed(self._layers()[:-1]):  # from the input of the top layer, which is predicted
            image = layer.predict(F.max_unpool2d(image, switches.pop(), [2, 2], output_size=sizes.pop()))
        image = image.detach() if self.greedy else image
        active = code.gt(0).to(code.dtype).sum((1, 2, 3))
        return Representation(self.probe(code), image, torch.stack(losses, 1), active)

    def _layers(self) -> list[SparseCoding]:
        return list(self.layers)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Tensor:
        """The top code [N, codes, H / 2^(layers - 1), W / 2^(layers - 1)] of images."""
        code = x
        for number, layer in enumerate(self._layers()):
            code = layer(F.max_pool2d(code, 2) if number else code)
        return code


class HierarchicalSparseCoding(nn.Module):
    """Sparse codes of patches, and sparse codes of how those vary over the image; in products of matrices.

    Yu, Lin and Lafferty, 'Learning image representations from the pixel level via hierarchical sparse coding', 2011.
    With the patches X of an image, the first layer has codes W and a dictionary B; the second has one code a >= 0 for
    the image, whose dictionary P >= 0 makes the variances P a of the entries of W:

        |X - W B|^2 / 2 + sum_j S_j / (P a)_j / 2 + penalty |W|_1 + second_penalty |a|_1,  S = mean of W^2 over patches

    (the diagonal covariance of the paper). W takes proximal gradient steps, a multiplicative ones, that keep it above
    zero and never raise the sum. Products with B and P, and with their transposes, are all that inference does.

    Args:
        in_channels: channels of the images.
        num_classes: how many logits come out.
        image_size: height and width of the images, in pixels.
        atoms: of the first dictionary.
        groups: atoms of the second dictionary.
        width: factor on both.
        patch: side of the patches; they overlap by half.
        iterations: rounds of inference, W and then a.
        penalty: on W.
        second_penalty: on a.
        probe: whether the classifier only reads.

    Raises:
        ValueError: patches larger than the image, or no iterations.

    Example:
        >>> net = HierarchicalSparseCoding(image_size=8, patch=4)
        >>> net(torch.rand(2, 1, 8, 8)).reconstruction.shape, net.encode(torch.rand(2, 1, 8, 8)).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 160]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        *,
        atoms: int = 128,
        groups: int = 32,
        width: float = 1.0,
        patch: int = 6,
        iterations: int = 4,
        penalty: float = 0.1,
        second_penalty: float = 0.1,
        probe: bool = True,
    ) -> None:
        super().__init__()
        if not 2 <= patch <= image_size:
            raise ValueError(f"`patch` must be between 2 and `image_size` ({image_size}), got {patch}")
        if iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {iterations}")
        atoms, groups = scaled(atoms, width), scaled(groups, width)
        self.patch, self.stride, self.iterations = patch, max(1, patch // 2), iterations
        self.penalty, self.second_penalty = penalty, second_penalty
        self.dictionary = nn.Parameter(F.normalize(torch.randn(atoms, in_channels * patch**2), dim=1))
        self.variances = nn.Parameter(torch.rand(atoms, groups) / groups + 0.5 / groups)
        norm = float(torch.linalg.matrix_norm(self.dictionary.detach(), 2)) ** 2
        self.log_step = nn.Parameter(torch.full((iterations,), -math.log(norm + 1.0)))
        self.probe = LinearProbe(atoms + groups, 0, num_classes, detached=probe)

    def forward(self, x: Tensor) -> Representation:
        """Of images [N, in_channels, H, W], all of one size."""
        patches = self._patches(x)
        codes, group_codes = self._infer(patches)
        predicted = self._predict(codes)
        spread = codes.square().mean(1)
        energy = 0.5 * (patches - predicted).square().sum(2).mean(1) + self.penalty * codes.abs().sum(2).mean(1)
        energy = energy + 0.5 * (spread / self._variance(group_codes)).sum(1) + self.second_penalty * group_codes.sum(1)
        return Representation(
            self.probe(self._summary(codes, group_codes)),
            self._assemble(predicted, x),
            energy[:, None] / self.patch**2,
            codes.ne(0).to(codes.dtype).sum((1, 2)),
        )

    def encode(self, x: Tensor) -> Tensor:
        """Root mean squares of the first codes and the second code, side by side: [N, atoms + groups]."""
        return self._summary(*self._infer(self._patches(x)))

    def _infer(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the patches, [N, places, atoms], and of their variances, [N, groups]."""
        steps = self.log_step.exp()
        codes = _shrink(steps[0] * self._correlate(patches), steps[0] * self.penalty)
        group_codes = self._update(patches.new_ones(patches.shape[0], self.variances.shape[1]), codes)
        for step in steps[1:]:
            codes = _shrink(codes + step * self._correlate(patches - self._predict(codes)), step * self.penalty)
            codes = codes / (1 + step / self._variance(group_codes)[:, None])  # proximal, of the variances' term
            group_codes = self._update(group_codes, codes)
        return codes, group_codes

    # One product of two matrices each: torch would multiply batches of them in one way or another, by their sizes.

    def _correlate(self, patches: Tensor) -> Tensor:
        """[N, places, C * patch^2] with each atom: [N, places, atoms]."""
        products: Tensor = F.linear(patches.flatten(0, 1), self.dictionary).unflatten(0, patches.shape[:2])
        return products

    def _predict(self, codes: Tensor) -> Tensor:
        """Patches, [N, places, C * patch^2], from their codes."""
        patches: Tensor = torch.mm(codes.flatten(0, 1), self.dictionary).unflatten(0, codes.shape[:2])
        return patches

    def _update(self, group_codes: Tensor, codes: Tensor) -> Tensor:
        """One multiplicative step: the root of what pulls up over what pulls down."""
        variance = self._variance(group_codes)
        up = 0.5 * torch.mm(codes.square().mean(1) / variance.square(), self.variances.abs())
        return group_codes * (up / self.second_penalty + 1e-8).sqrt()

    def _variance(self, group_codes: Tensor) -> Tensor:
        return F.linear(group_codes, self.variances.abs()) + 1e-2

    @staticmethod
    def _summary(codes: Tensor, group_codes: Tensor) -> Tensor:
        return torch.cat([(codes.square().mean(1) + 1e-8).sqrt(), group_codes], 1)

    def _patches(self, x: Tensor) -> Tensor:
        """[N, places, C * patch^2]; the image is mirrored at its ends, so that patches cover it."""
        return F.unfold(self._padded(x), self.patch, stride=self.stride).transpose(1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        short = [-(side - self.patch) % self.stride for side in x.shape[2:]]
        return F.pad(x, (0, short[1], 0, short[0]), mode="reflect")

    def _assemble(self, patches: Tensor, x: Tensor) -> Tensor:
        """Images from overlapping patches, which are averaged."""
        size = self._padded(x).shape[2:]
        total = F.fold(patches.transpose(1, 2), size, self.patch, stride=self.stride)
        ones = torch.ones_like(patches[:1]).transpose(1, 2)
        images = total / F.fold(ones, size, self.patch, stride=self.stride)
        return images[..., : x.shape[2], : x.shape[3]]


def _shrink(x: Tensor, threshold: Tensor) -> Tensor:
    """Soft thresholding, the proximal step of the l1 norm."""
    return F.relu(x - threshold) - F.relu(-x - threshold)


def _largest_eigenvalue(filters: TiedConv2d, side: int = 16, rounds: int = 20) -> float:
    """Of a convolution and back, by power iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = torch.randn(1, filters.in_channels, side, side, generator=generator)
        for _ in range(rounds):
            x = filters(filters(x), transposed=True)
            x = x / x.norm()
        return float(filters(x).square().sum())
