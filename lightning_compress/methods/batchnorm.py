"""BatchNorm's running statistics, re-estimated for a network that has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_compress.calls import Call, run_calls
from lightning_compress.quiet import evaluating

__all__ = ["reestimate_batchnorm"]


def reestimate_batchnorm(model: nn.Module, calls: Sequence[Call]) -> None:
    """Replace BatchNorm's running statistics by averages over `calls`; everything else stays in evaluation mode.

    Args:
        model: the network.
        calls: calibration data; each call is one batch of the average.

    Example:
        >>> import torch
        >>> from lightning_compress.calls import as_calls
        >>> net = nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(net, as_calls(torch.full((8, 1), 3.0)))
        >>> net.running_mean
        tensor([3.])
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    with evaluating(model), _cumulative(norms):
        run_calls(model, calls)


@contextmanager
def _cumulative(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    before = [
        (norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: a plain average over all batches
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(tracked)
