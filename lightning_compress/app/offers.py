"""What Hydra is to know before it starts: networks of other libraries, as if each had a file in conf/, and sweepers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

__all__ = ["offer_networks", "offer_sweepers"]

_NAMED = re.compile(r"\b(timm|torchvision)/([\w.]+)")


def offer_networks(arguments: Iterable[str]) -> None:
    """`arch=timm/NAME`, `arch=torchvision/NAME`: make options of the networks that a command line names.

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


def offer_sweepers() -> None:
    """Register our sweepers, which Hydra finds itself only where this package is installed from a wheel."""
    plugins = Plugins.instance()
    # Not before: to find plugins Hydra runs the modules of its own once more, and what derives from them must be new.
    from hydra_plugins.lightning_compress_sweepers.grid import GridSweeper
    from hydra_plugins.lightning_compress_sweepers.pareto import ParetoSweeper

    for sweeper in (GridSweeper, ParetoSweeper):
        plugins.register(sweeper)
