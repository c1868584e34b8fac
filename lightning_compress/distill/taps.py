"""Taps: forward hooks that keep what layers give, by dotted name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_compress.wording import near_names

__all__ = ["DistillationError", "Taps", "logits_of"]


class DistillationError(ValueError):
    """Student and teacher cannot be brought together; the message names what stands in the way."""


class Taps:
    """Keeps the outputs of a network's layers while it is open.

    Args:
        network: the network; inside a `torch.compile`d one the names are those of the original.
        names: dotted names of layers; the empty name is the network itself.
        who: "student" or "teacher", for error messages.

    Raises:
        DistillationError: a name does not exist; the message lists near ones.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> taps = Taps(net, ["0", ""], "student")
        >>> taps.open = True
        >>> _ = net(torch.zeros(1, 2))
        >>> {name: tuple(value.shape) for name, value in taps.take().items()}
        {'0': (1, 3), '': (1, 3)}
    """

    def __init__(self, network: nn.Module, names: Iterable[str], who: str) -> None:
        self.who, self.open = who, False
        self._kept: dict[str, Any] = {}
        inner = getattr(network, "_orig_mod", network)
        layers = dict(inner.named_modules())
        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            if name not in layers:
                near = near_names(name, list(layers))
                raise DistillationError(f"the {who} has no layer {name!r}; near names: {near}")
        self._handles: list[RemovableHandle] = []
        for name in self.names:
            # A compiled network is called through its wrapper.
            layer = layers[name] if name else network
            self._handles.append(layer.register_forward_hook(_Keep(self, name).keep))
        if inner is not network and any(self.names):
            # What was compiled before knows nothing of the hooks, and torch does not guard on them.
            torch.compiler.reset()

    def take(self) -> dict[str, Any]:
        """What was kept since the last time, by name.

        Raises:
            DistillationError: a layer did not run.
        """
        kept, self._kept = self._kept, {}
        for name in self.names:
            if name not in kept:
                raise DistillationError(
                    f"the {self.who}'s layer {name!r} did not run when the {self.who} was called: name one that does"
                )
        return kept

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = {}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Keep:
    """The hook of one layer. A method of something outside the network: copies of the network go without it."""

    def __init__(self, taps: Taps, name: str) -> None:
        self.taps, self.name = taps, name

    def keep(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        taps = self.taps
        if not taps.open:
            return
        if self.name in taps._kept:
            raise DistillationError(
                f"the {taps.who}'s layer {self.name!r} ran twice in one forward pass: its output is not one tensor; "
                "name a layer that runs once"
            )
        taps._kept[self.name] = output


def logits_of(output: Any, who: str, name: str) -> Tensor:
    """The one tensor in what a network or layer gave: itself, its `logits`, or the only one in a structure.

    Raises:
        DistillationError: there are several.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        what = f"layer {name!r}" if name else "network"
        raise DistillationError(
            f"the {who}'s {what} gives {len(tensors)} tensors in a {type(output).__name__}, and none of them is called "
            "`logits`; name the layer to compare with Term(loss, student=..., teacher=...)"
        )
    return tensors[0]
