"""Small networks that try the coupling hard, and a generator of random ones."""

from __future__ import annotations

from tests.networks import norms, rearranged, shared, topology
from tests.networks.base import Network, block, classifier, randomize
from tests.networks.generated import RandomNetwork, networks

__all__ = ["AWKWARD", "Network", "RandomNetwork", "block", "classifier", "networks", "randomize"]

AWKWARD: dict[str, type[Network]] = {
    name: item
    for module in (rearranged, shared, topology, norms)
    for name, item in vars(module).items()
    if isinstance(item, type) and issubclass(item, Network) and item.__module__ == module.__name__
}
"""Every awkward network, by name."""
