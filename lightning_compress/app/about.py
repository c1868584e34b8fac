"""What a job is called, and the command that runs it again."""

from __future__ import annotations

import shlex
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["describe"]

PROGRAM = "lightning-compress"

# Where jobs run is no part of what they are.
_ELSEWHERE = ("launcher=", "hydra.")


def describe(hydra: DictConfig) -> dict[str, Any]:
    """A job as those see it who read its folder later, from Hydra's own part of its configuration.

    Args:
        hydra: the node `hydra` of a job's configuration.

    Returns:
        `name`, `overrides`, `choices` (of the configuration's groups, Hydra's own left out) and `command`.

    Example:
        >>> hydra = {
        ...     "job": {"override_dirname": "arch=lenet5"},
        ...     "overrides": {"task": ["arch=lenet5", "launcher=joblib"]},
        ...     "runtime": {"choices": {"arch": "lenet5", "hydra/launcher": "joblib"}},
        ... }
        >>> about = describe(OmegaConf.create(hydra))
        >>> about["name"], about["choices"], about["command"]
        ('arch=lenet5', {'arch': 'lenet5'}, 'lightning-compress arch=lenet5')
    """
    overrides = [override for override in hydra.overrides.task if not override.startswith(_ELSEWHERE)]
    # a sweep that is written down says itself that it is one; of its jobs, one alone is wanted here
    single = ["hydra.mode=RUN"] if any(override.startswith("sweep=") for override in overrides) else []
    choices = OmegaConf.to_container(hydra.runtime.choices)
    assert isinstance(choices, dict)
    return {
        "name": hydra.job.override_dirname,
        "overrides": overrides,
        "choices": {name: choice for name, choice in choices.items() if not str(name).startswith("hydra/")},
        "command": shlex.join([PROGRAM, *overrides, *single]),
    }
