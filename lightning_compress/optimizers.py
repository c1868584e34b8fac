"""Optimizers that go on after an edit: state of the old shape is cut like the tensor it belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.edits import Change

__all__ = ["follow_edits"]


def follow_edits(optimizer: Optimizer, changes: Sequence[Change]) -> None:
    """Cut an optimizer's state (momenta, second moments, ...) as the parameters were cut.

    Edits swap the data of the parameters, so `param_groups`, and with them learning rates and schedules, need no
    change. State tensors of the parameter's old shape are cut; scalars (step counts) stay. State of any other shape
    (factored moments) cannot follow: it is dropped for that parameter, with a warning.

    Args:
        optimizer: the optimizer.
        changes: what `apply_edits` returned.

    Example:
        >>> import torch
        >>> from lightning_compress.edits import Keep, apply_edits
        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> adam.step()
        >>> follow_edits(adam, apply_edits(net, [Keep({"weight": {0: (0, 2)}}, {"weight": (3, 2)})]))
        >>> adam.state[net.weight]["exp_avg"].shape
        torch.Size([2, 2])
    """
    for change in changes:
        state = optimizer.state.get(change.tensor)
        if not state:
            continue
        odd = [
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != change.old_shape
        ]
        if odd:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(odd)} in another shape than the parameter "
                f"({list(change.old_shape)}); its state for this parameter starts anew",
                stacklevel=2,
            )
            del optimizer.state[change.tensor]
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == change.old_shape and value.dim() > 0:
                state[name] = change.slice(value)
