"""What networks give that learn a representation of images without labels: one form for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.zoo.feedforward.parts import scaled

__all__ = ["LinearProbe", "Representation", "code_widths"]


class Representation(NamedTuple):
    """What such a network gives for a batch of N images.

    The codes themselves are not among it: what a network returns keeps its width, and so would they.

    Attributes:
        logits: of a linear classifier on the top codes, [N, classes].
        reconstruction: of the images from the top codes, [N, C, H, W].
        losses: what each layer is to make small, on what the layer below gives it, [N, layers], in units of one pixel.
        active: how many units of the top codes are on: for real codes those that are not zero, for probabilities their
            sum; [N].
    """

    logits: Tensor
    reconstruction: Tensor
    losses: Tensor
    active: Tensor


class LinearProbe(nn.Module):
    """A linear classifier that reads codes and does not shape them (Alain and Bengio 2016, arXiv 1610.01644).

    Codes are brought to mean 0 and variance 1.

    Args:
        channels: of the codes.
        side: of the codes, in pixels; 0: they have no sides.
        num_classes: how many logits come out.
        detached: let no gradient go back into the codes.
        pooled: take the maximum of each 2 x 2 block first, if there is more than one pixel.

    Example:
        >>> import torch
        >>> LinearProbe(8, 4, 10)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, side: int, num_classes: int, detached: bool = True, pooled: bool = False) -> None:
        super().__init__()
        self.detached, self.pooled = detached, pooled and side > 1
        self.norm = nn.BatchNorm2d(channels, affine=False) if side else nn.BatchNorm1d(channels, affine=False)
        side = side // 2 if self.pooled else max(1, side)
        self.classifier = nn.Linear(channels * side**2, num_classes)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits [N, num_classes] of codes [N, channels, side, side] or [N, channels]."""
        if self.detached:
            codes = codes.detach()
        if self.pooled:
            codes = F.max_pool2d(codes, 2)
        logits: Tensor = self.classifier(self.norm(codes).flatten(1))
        return logits


def code_widths(codes: Sequence[int], width: float, image_size: int, halvings: int) -> list[int]:
    """The channels of a stack of layers, for images that can be halved as often as it does.

    Args:
        codes: channels of each layer.
        width: factor on them.
        image_size: height and width of the images, in pixels.
        halvings: how often they are halved.

    Raises:
        ValueError: no layers, or images that cannot be halved so often.

    Example:
        >>> code_widths((32, 64), 0.5, image_size=28, halvings=2)
        [16, 32]
    """
    if not codes:
        raise ValueError("`codes` must name the channels of one layer at least")
    if image_size % 2**halvings or image_size < 2**halvings:
        raise ValueError(
            f"`image_size` must be a multiple of {2**halvings}, since it is halved {halvings} times, got {image_size}"
        )
    return [scaled(channels, width) for channels in codes]
