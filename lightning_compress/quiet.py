"""Running and copying a network without anyone noticing."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "undisturbed", "without_observers"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and a fixed random state; modes and random state are put back on leaving.

    The fused kernels of attention are off inside, so that what runs is made of ordinary operations.

    Args:
        model: the network that is run inside the block.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with evaluating(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(0)
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and the buffers too are what they were on leaving.

    Args:
        model: the network that is run inside the block.
    """
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        with evaluating(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


@contextlib.contextmanager
def without_observers(model: nn.Module) -> Iterator[None]:
    """Take off the hooks that somebody outside holds, for as long as `model` is copied or measured.

    A hook that is a method of something which is no part of the network (a callback that records features, say) only
    watches, and a deep copy of the network would copy that something with it, Trainer and all. All other hooks may be
    part of what the network computes (weight norm, pruning masks); they stay.

    Args:
        model: the network whose observers rest inside the block.

    Example:
        >>> class Watcher:
        ...     seen = 0
        ...     def look(self, *_):
        ...         self.seen += 1
        >>> net, watcher = nn.Linear(1, 1), Watcher()
        >>> handle = net.register_forward_hook(watcher.look)
        >>> with without_observers(net):
        ...     _ = net(torch.zeros(1, 1))
        >>> _ = net(torch.zeros(1, 1))
        >>> watcher.seen
        1
    """
    parts = {id(module) for module in model.modules()}
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for kind in _HOOKS:
                hooks = module.__dict__[kind]
                saved.append((module, kind, hooks))
                module.__dict__[kind] = OrderedDict(
                    (i, hook) for i, hook in hooks.items() if not _observes(hook, parts)
                )
        yield
    finally:
        for module, kind, hooks in saved:
            module.__dict__[kind] = hooks


def _observes(hook: Any, parts: set[int]) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return isinstance(hook, types.MethodType) and id(hook.__self__) not in parts
