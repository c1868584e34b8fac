"""`arch=timm/NAME` and `arch=torchvision/NAME`: networks of other libraries as if each had a file in conf/arch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore

__all__ = ["offer_networks"]

_NAMED = re.compile(r"\b(timm|torchvision)/([\w.]+)")


def offer_networks(arguments: Iterable[str]) -> None:
    """Make options of the group arch of those networks that a command line names.

    There are more than a thousand, so only what is named becomes an option; whether the library has it is found out
    when the network is built. Sweeps, and other packages (`arch@teacher.net=timm/NAME`), take them as any option.

    Args:
        arguments: of the command line.
    """
    store = ConfigStore.instance()
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key.partition("@")[0] != "arch":
            continue
        for library, name in _NAMED.findall(value):
            node = {"defaults": [f"/arch/{library}@_here_", "_self_"], "name": name}
            store.store(name, node, group=f"arch/{library}", package="arch", provider="lightning-compress")
