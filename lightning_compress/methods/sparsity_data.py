"""What weight pruning asks of data and gradients: how large a weight's inputs are, and which weights to grow again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, run_calls
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["exchange", "input_norms"]


@torch.no_grad()
def exchange(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> int:
    """Let the smallest of the living weights die, and as many of the dead ones live: those with the largest gradients.

    Args:
        weight: the weight.
        mask: where it is alive; changed in place.
        gradient: of the loss, of dead weights too.
        share: of the living ones.

    Returns:
        How many were exchanged.

    Example:
        >>> mask = torch.tensor([1, 1, 0, 0], dtype=torch.uint8)
        >>> exchange(torch.tensor([3.0, 1.0, 0.0, 0.0]), mask, torch.tensor([0.0, 0.0, 1.0, -2.0]), 0.5), mask.tolist()
        (1, [1, 0, 0, 1])
    """
    alive, slope = mask.bool().flatten(), gradient.detach().flatten().abs()
    count = min(int(share * int(alive.sum())), int((~alive).sum()))
    if count:
        dying = torch.where(alive, weight.detach().abs().flatten(), torch.inf).topk(count, largest=False).indices
        born = torch.where(alive, -torch.inf, slope).topk(count).indices
        flat = mask.view(-1)
        flat[dying], flat[born] = 0, 1
    return count


@torch.no_grad()
def input_norms(network: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The root of the mean square of each input that a layer sees.

    Args:
        network: the network.
        calls: calibration data.

    Returns:
        Name of the weight -> one value for each input channel; of linear layers and convolutions without groups.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, sides: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float()
            square = x.square().transpose(0, x.dim() - 1 - sides).flatten(1).sum(1)
            before, count = sums.get(name, (torch.zeros_like(square), 0))
            sums[name] = before + square, count + x.numel() // len(square)

        return hook

    with without_observers(network), undisturbed(network):
        handles = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(watch(f"{name}.weight".lstrip("."), 0)))
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
                sides = module.weight.dim() - 2
                handles.append(module.register_forward_pre_hook(watch(f"{name}.weight".lstrip("."), sides)))
        try:
            run_calls(network, calls)
        finally:
            for handle in handles:
                handle.remove()
    return {name: (total / count).sqrt() for name, (total, count) in sums.items()}
