"""What was perhaps meant by names on a command line that Hydra does not know."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_compress.wording import did_you_mean

__all__ = ["other_kinds", "print_hints", "unknown_names"]

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
    hints, known = [], []
    with _our_configuration() as loader:
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


@contextmanager
def _our_configuration() -> Iterator[ConfigLoader]:
    """Look into this package's configuration, and let the Hydra that is at work go on afterwards."""
    state = GlobalHydra.instance()
    at_work = state.hydra
    state.clear()
    try:
        with initialize_config_module("lightning_compress.conf", version_base="1.3"):
            assert state.hydra is not None
            yield state.hydra.config_loader
    finally:
        GlobalHydra.instance().hydra = at_work  # the instance itself may be another by now


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


def other_kinds(overrides: Sequence[str], config_name: str = "train") -> list[str]:
    """What there is to say of values that are of another kind than those they replace: a word for a number, say.

    Args:
        overrides: of a job, of which all names are known.
        config_name: the configuration that they override.

    Returns:
        A line for each.

    Example:
        >>> other_kinds(["arch=lenet5", "trainer.max_epochs=ten", "report.batch_sizes=1", "method.budget.macs=0.25"])
        ["`trainer.max_epochs` is by default 8, got 'ten'", '`report.batch_sizes` is by default [1, 32], got 1']
    """
    with _our_configuration() as loader:
        options = loader.get_group_options
        groups = [given for given in overrides if options(given.lstrip("+").partition("=")[0].partition("@")[0])]
        try:
            before, after = compose(config_name, overrides=groups), compose(config_name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException):  # of other searchpaths
            return []
    said = []
    for override in overrides:
        name = override.lstrip("+").partition("=")[0]
        try:
            usual, given = OmegaConf.select(before, name), OmegaConf.select(after, name)
        except OmegaConfBaseException:  # known inside of a job only
            continue
        if usual is not None and given is not None and _kind(usual) != _kind(given):
            said.append(f"`{name}` is by default {usual!r}, got {given!r}")
    return said


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int | float):
        return "number"
    return "list" if OmegaConf.is_list(value) else "mapping" if OmegaConf.is_dict(value) else "word"
