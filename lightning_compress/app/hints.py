"""What was perhaps meant by names on a command line that Hydra does not know."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_compress.wording import did_you_mean

__all__ = ["print_hints", "unknown_names"]

_OVERRIDE = re.compile(r"(?P<name>[\w/@.]+)=(?P<value>.*)", re.DOTALL)


def print_hints(arguments: Sequence[str], config_name: str) -> None:
    """After Hydra has refused a command line: print what was perhaps meant.

    Args:
        arguments: of the command line.
        config_name: the configuration that it overrides.
    """
    for hint in unknown_names(arguments, config_name):
        sys.stderr.write(f"{hint}\n")


def unknown_names(arguments: Sequence[str], config_name: str = "train") -> list[str]:
    """What there is to say about overrides that name no group, no option or no value of the configuration.

    Args:
        arguments: of the command line.
        config_name: the configuration that they override.

    Returns:
        A line for each that is near to something that there is.

    Example:
        >>> unknown_names(["arch=resnt20", "method.budget.mac=0.5", "seed=1"])
        ["arch=resnt20: did you mean 'resnet20'?", "method.budget.mac: did you mean 'method.budget.macs'?"]
    """
    given = [match.groupdict() for match in map(_OVERRIDE.fullmatch, arguments) if match]
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        loader, hints, known = hydra.config_loader, [], []
        groups = loader.list_groups("")
        for name, value in ((item["name"], item["value"]) for item in given):
            group = name.partition("@")[0]
            if loader.get_group_options(group):
                unknown = list(_unknown(loader, group, value))
                hints += [f"{name}={choice}:{did_you_mean(choice, options)[1:]}" for choice, options in unknown]
                known += [] if unknown or "," in value else [f"{name}={value}"]
        try:
            names = [*groups, *_names(compose(config_name, overrides=known))]
        except (HydraException, OmegaConfBaseException):  # something else is wrong, and was said
            return [hint for hint in hints if hint.endswith("?")]
        for item in given:
            name = item["name"]
            if "@" not in name and not name.startswith("hydra.") and not loader.get_group_options(name):
                hints += [] if name in names else [f"{name}:{did_you_mean(name, names)[1:]}"]
    return [hint for hint in hints if hint.endswith("?")]


def _unknown(loader: ConfigLoader, group: str, value: str) -> Iterator[tuple[str, list[str]]]:
    """Options that a group does not have, with those that it has."""
    options = loader.get_group_options(group, ObjectType.CONFIG)
    for choice in value.split(","):
        if choice and "/" not in choice and re.fullmatch(r"\w+", choice) and choice not in options:
            yield choice, options


def _names(config: DictConfig, path: str = "") -> Iterator[str]:
    """Dotted names of all nodes."""
    for key in config:
        assert isinstance(key, str)
        name = f"{path}{key}"
        yield name
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            node = config[key]
            if isinstance(node, DictConfig):
                yield from _names(node, f"{name}.")
