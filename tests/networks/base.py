"""What the awkward networks have in common, and the randomisation without which proofs have no teeth."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

AFFINE = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


class Network(nn.Module):
    """A small network that tries one thing hard.

    Attributes:
        shapes: the shape of each argument of `forward`, the batch first.
        heads: names of the modules whose outputs leave the network; tools that cannot see it need telling.
    """

    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((2, 3, 16, 16),)
    heads: ClassVar[tuple[str, ...]] = ("head",)

    @classmethod
    def example(cls, seed: int = 0) -> tuple[Tensor, ...]:
        """Arguments for `forward`, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator) for shape in cls.shapes)


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def classifier(inputs: int, outputs: int = 10) -> nn.Sequential:
    """Global average pooling and a linear layer, from (batch, channels, height, width)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(inputs, outputs))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every running statistic a random value far from what initialisation leaves.

    At initialisation biases and running means are 0, affine weights 1, residual and layer scales 0 or 1e-6: a
    network like that hides wrong cuts, since a channel that is left over adds nothing.

    Args:
        model: any network; changed in place.
        seed: the same seed gives the same values whatever the initialisation was.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    affine = {id(m.weight) for m in model.modules() if isinstance(m, AFFINE) and m.weight is not None}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            # Gain between linear and He, so that neither plain nor residual stacks vanish or explode.
            scale = math.sqrt(1.5 * parameter.shape[0] / parameter.numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif id(parameter) in affine or not name.endswith("bias"):
            uniform(parameter, 0.4, 1.2)
        else:
            uniform(parameter, -0.5, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            uniform(buffer, -0.5, 0.5)
        elif name.endswith("running_var"):
            uniform(buffer, 0.5, 1.5)
    return model
