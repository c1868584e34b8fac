"""How a network uses its weights: by the layers that own them, upward or also downward, or by other code too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_compress.calls import Call, resize_batch
from lightning_compress.layers import Chain
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["Uses", "find_uses"]


class Uses(TorchFunctionMode):
    """One run of a network, watched.

    Args:
        model: the network.

    Attributes:
        outside: ids of the parameters that are used while the layer that owns them does not run.
        downward: paths of the layers that are called with `transposed=True`, as a `TiedConv2d` is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outside: set[int] = set()
        self.downward: set[str] = set()
        self._running: list[nn.Module] = []
        self._owners: dict[int, set[int]] = defaultdict(set)
        for module in model.modules():
            # a chain that is called as a whole owns the weights of its layers
            for parameter in module.parameters(recurse=isinstance(module, Chain)):
                self._owners[id(parameter)].add(id(module))

    def run(self, calls: Sequence[Call]) -> None:
        """Run the network."""
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                before = module.register_forward_pre_hook(self._hook(path, self.enter), prepend=True, with_kwargs=True)
                after = module.register_forward_hook(self._hook(path, self.leave), always_call=True, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(self)
            for call in calls:
                self.begin(call)
                self.model.get_submodule(call.path)(*call.args, **call.kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                owners = self._owners.get(id(leaf))
                if owners is not None and not any(id(module) in owners for module in self._running):
                    self.outside.add(id(leaf))
        return func(*args, **(kwargs or {}))

    def begin(self, call: Call) -> None:
        """A call of the network begins."""

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module begins to run."""
        self._running.append(module)
        if kwargs.get("transposed") is True:
            self.downward.add(path)

    def leave(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A module has run."""
        self._running.pop()

    @staticmethod
    def _hook(path: str, method: Any) -> Any:
        def hook(*arguments: Any) -> None:
            method(path, *arguments)

        return hook


def find_uses(model: nn.Module, calls: Sequence[Call]) -> Uses:
    """How a network uses its weights.

    Args:
        model: the network; it is left as it was.
        calls: how it is called.

    Example:
        >>> import torch
        >>> from lightning_compress.calls import as_calls
        >>> from lightning_compress.tied import TiedConv2d
        >>> class Back(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.filters = TiedConv2d(1, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return self.filters(self.filters(x), transposed=True)
        >>> uses = find_uses(Back(), as_calls(torch.zeros(1, 1, 6, 6)))
        >>> uses.downward, uses.outside
        ({'filters'}, set())
    """
    uses = Uses(model)
    with without_observers(model), undisturbed(model):
        uses.run(resize_batch(calls, 1))
    return uses
