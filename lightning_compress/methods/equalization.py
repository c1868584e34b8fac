"""Cross-layer equalization: scales exchanged between layers, so that no channel is much smaller than the others.

A ReLU lets a positive factor through. So each channel between two layers can be made smaller by the first and larger by
the second, and the network computes what it did, while all channels make better use of one grid (Nagel et al. 2019,
arXiv 1906.04721). Weights have a step for each output here, so it is the values between layers that gain by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.methods.placement import Pair

__all__ = ["equalize"]

SWEEPS = 3
MOST = 100.0
"""The largest factor: channels of nothing stay nothing."""


@torch.no_grad()
def equalize(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Exchange scales between layers; the outputs of the network stay what they were.

    Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721).

    Args:
        model: the network, in which weights, biases and the affine parameters of norms are set.
        pairs: the layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> before = net(torch.ones(1, 2))
        >>> equalize(net, [Pair("0.weight", "2.weight", bias="0.bias")])
        >>> torch.allclose(net(torch.ones(1, 2)), before, atol=1e-6)
        True
    """
    for _ in range(SWEEPS):
        for pair in pairs:
            _exchange(model, pair)


def _exchange(model: nn.Module, pair: Pair) -> None:
    ours, theirs = (model.get_parameter(name) for name in (pair.first, pair.second))
    norm = None if pair.norm is None else model.get_submodule(pair.norm)
    sizes = ours.flatten(1).abs().amax(1)
    if norm is not None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if not norm.affine:  # nothing to scale by
            return
        assert norm.running_var is not None
        sizes = sizes * norm.weight.abs() * (norm.running_var + norm.eps).rsqrt()
    groups = len(sizes) // theirs.shape[1]
    incoming = theirs.unflatten(0, (groups, -1))  # [G, O, C, *k]
    wanted = incoming.abs().transpose(1, 2).flatten(2).amax(2).flatten()
    alive = (sizes > 0) & (wanted > 0)
    factor = torch.where(alive, (wanted / sizes.clamp_min(1e-12)).sqrt(), 1.0).clamp(1 / MOST, MOST)
    scaled = [ours] if pair.bias is None else [ours, model.get_parameter(pair.bias)]
    for parameter in scaled if norm is None else norm.parameters():
        parameter.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)).to(parameter.dtype))
    sides: list[int] = [1] * (theirs.dim() - 2)
    share: Tensor = factor.view(groups, 1, -1, *sides).to(theirs.dtype)
    theirs.copy_((incoming / share).flatten(0, 1))
