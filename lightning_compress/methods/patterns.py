"""Patterns of names, as users give them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from lightning_compress.wording import near_names

__all__ = ["matches", "unmatched"]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter's name, or that of a module that it is in.

    Example:
        >>> matches("layer1.0.conv1.weight", "layer1.*"), matches("layer1.0.conv1.weight", "conv1")
        (True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def unmatched(network: nn.Module, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches no parameter and no module of a network."""
    names = {*dict(network.named_parameters()), *dict(network.named_modules())}
    return next((p for p in patterns if not any(fnmatchcase(name, p) for name in names)), None)


def no_match(network: nn.Module, pattern: str) -> str:
    """What is said of a pattern that matches nothing.

    Args:
        network: whose names are looked for.
        pattern: that matches none of them.

    Example:
        >>> no_match(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "fc*")
        "pattern 'fc*' matches no parameter and no module of the network; near names: 0, 1"
    """
    modules = [name for name, _ in network.named_modules() if name]
    return (
        f"pattern {pattern!r} matches no parameter and no module of the network; near names: "
        f"{near_names(pattern, modules)}"
    )
