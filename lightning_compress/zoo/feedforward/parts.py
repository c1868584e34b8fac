"""What the networks share: convolution with BatchNorm, average over space, scaled widths, initialisation."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["conv_bn", "global_average", "he_initialise", "scaled"]


def conv_bn(in_channels: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the sides (divided by `stride`), and BatchNorm.

    Args:
        in_channels: channels that come in.
        channels: channels that come out.
        kernel: side of the filters, odd.
        stride: step of the filters.
        groups: of channels that do not see each other.
    """
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def global_average(x: Tensor) -> Tensor:
    """The mean of each channel: from [N, C, H, W] to [N, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """A number of channels times `width`, rounded.

    Args:
        channels: at width 1.
        width: the factor.
        multiple: what the result is to be divisible by, for groups and halves.

    Returns:
        The nearest multiple, at least one of it.

    Raises:
        ValueError: `width` is not above 0.

    Example:
        >>> scaled(64, 0.3), scaled(64, 0.3, multiple=2), scaled(64, 0.001)
        (19, 20, 1)
    """
    if not width > 0:
        raise ValueError(f"`width` must be above 0, got {width}")
    return multiple * max(1, round(channels * width / multiple))


def he_initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Normal weights of convolutions that keep the variance through ReLU (He et al. 2015, arXiv 1502.01852).

    Args:
        model: its convolutions are initialised, in the order of `modules()`.
        mode: keep the variance of activations ("fan_in") or of gradients ("fan_out"). The first minds groups, which
            matters where no BatchNorm makes it good.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
