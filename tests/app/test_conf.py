"""The configuration in conf/: every option composes, and every node fits what it names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import lightning_compress.app.train
import lightning_compress.conf

CONF = Path(lightning_compress.conf.__file__).parent
OPTIONS = sorted(
    (file.parent.relative_to(CONF).as_posix(), file.stem)
    for file in CONF.rglob("*.yaml")
    if file.parent != CONF and "hydra" not in file.relative_to(CONF).parts
)
HYDRA_ARGUMENTS = {"_target_", "_convert_", "_recursive_", "_partial_", "_args_"}
GIVEN_IN_CODE = {"report": {"path"}}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, with its place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def unbound(config: DictConfig) -> list[str]:
    """What is wrong with the nodes of a configuration."""
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    nodes = {str(key): value for key, value in container.items() if key != "hydra"}
    nodes["hydra.callbacks"] = container["hydra"]["callbacks"]
    wrong = []
    for path, node in targets(nodes):
        arguments = {key for key in node if key not in HYDRA_ARGUMENTS} | GIVEN_IN_CODE.get(path, set())
        try:
            inspect.signature(get_object(node["_target_"])).bind(**dict.fromkeys(arguments))
        except TypeError as error:
            wrong.append(f"{path} ({node['_target_']}): {error}")
    return wrong


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: str(value))
def test_every_node_fits_the_signature_of_its_target(group: str, option: str) -> None:
    assert unbound(composed(f"{group}={option}")) == []


def test_a_typo_is_seen() -> None:
    [wrong] = unbound(composed("+trainer.max_epoch=3"))
    assert "max_epoch" in wrong


def test_a_missing_argument_is_seen() -> None:
    [wrong] = unbound(composed("~task.net"))
    assert "net" in wrong


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "method" and option != "none"])
def test_defaults_in_yaml_are_those_of_the_callback(option: str) -> None:
    config = composed(f"method={option}").method
    parameters = inspect.signature(get_object(config["_target_"])).parameters
    optional = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    # What one kind of a method differs from another by.
    chosen = {"losses", "task_weight"} | (
        {"decomposition", "operator", "options", "budget"} if "_" in option else set()
    )
    if option.startswith("channel_pruning_"):
        chosen |= {"criterion", "ranking", "regularization", "start", "steps"}
    if option.startswith("weight_pruning_"):
        chosen |= {"pattern", "criterion", "allocation", "schedule", "end", "regrow"}
    if option.startswith("quantization_"):
        chosen |= {"bits", "start", "end"}
    if option.startswith("low_bit_weights_"):
        chosen |= {"kind"}
    given = {
        name: list(v) if isinstance(v, tuple) else v for name, v in optional.items() if name in set(config) - chosen
    }
    assert given == {name: OmegaConf.to_container(config)[name] for name in given}


def test_a_wrong_name_gets_the_list_of_what_there_is() -> None:
    with pytest.raises(HydraException, match=r"(?s)resnet200.*lenet5.*resnet20.*vgg_small"):
        composed("arch=resnet200")


def test_the_folder_is_named_by_the_overrides() -> None:
    job = composed("arch=vgg_small", "method.budget.macs=0.25", "output_dir=/somewhere")
    OmegaConf.set_readonly(job.hydra, False)
    assert job.hydra.job.override_dirname == "arch=vgg_small,method.budget.macs=0.25"
