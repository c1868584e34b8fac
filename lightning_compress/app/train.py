"""`lightning-compress`: the command line. One job, or with `-m` a sweep of them; what a job does is in `work`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_compress.app.about import describe
from lightning_compress.app.hints import other_kinds, print_hints
from lightning_compress.app.jobs import Job, config_digest, folder_name
from lightning_compress.app.offers import offer_networks, offer_sweepers
from lightning_compress.app.sweep import Sweep
from lightning_compress.wording import did_you_mean

__all__ = ["main"]

log = logging.getLogger(__name__)

_FIGURES = ("metric", "params", "macs", "bytes", "peak_memory", "sparsity")
_MEASURED = ("latency_", "cpu_time_", "onnx_")  # of which there are as many as batch sizes

OmegaConf.register_new_resolver("lightning_compress.folder", folder_name, replace=True)


class JobError(CompactHydraException):
    """What a user can mend: Hydra prints its message without a traceback."""


def main() -> None:
    """The console script."""
    offer_networks(sys.argv[1:])
    offer_sweepers()
    try:
        _hydra_main()
    except SystemExit as ended:  # Hydra has said what is wrong
        if ended.code:
            print_hints(sys.argv[1:], "train")
        raise
    finally:  # of a sweep with failures, too, one wants to see what was done
        Sweep.end_pending()


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="train")
def _hydra_main(config: DictConfig) -> float | list[float]:
    hydra_config = cast(DictConfig, HydraConfig.get())
    folder = Path(hydra_config.runtime.output_dir)
    try:
        job = Job(folder, config_digest(config))
        about = describe(hydra_config)
    except OmegaConfBaseException as error:  # a value that must be given, an interpolation that leads nowhere
        said = "values that are missing are given as in data.root=FOLDER; the configuration cannot be resolved:"
        raise JobError(said) from error  # Hydra prints the cause as well
    results = job.finished()
    names = [config.objective] if isinstance(config.objective, str) else list(config.objective)
    if results is None:
        check_objectives(names)
        results = _run(config, folder, about)
    else:
        log.info("finished before, nothing to do: %s", folder)
    values = objectives(results, names)
    return values[0] if isinstance(config.objective, str) else values


def check_objectives(names: Sequence[str]) -> None:
    """Raise before a job if a figure is asked for that no job has; which metrics a task logs shows only in the run.

    Args:
        names: metrics, which have a slash in their names, and figures.

    Raises:
        JobError: there is none of such a name.

    Example:
        >>> check_objectives(["val/acc", "mac"])
        Traceback (most recent call last):
        lightning_compress.app.train.JobError: `objective` must be ... got 'mac'; did you mean 'macs'?
    """
    for name in names:
        if "/" not in name and not name.startswith(_MEASURED) and name not in _FIGURES:
            known = ", ".join((*_FIGURES, "latency_b1"))
            raise JobError(
                f"`objective` must be one of {known}, or a metric like val/acc, got {name!r}"
                f"{did_you_mean(name, _FIGURES)}"
            )


def objectives(results: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Figures of the final network: metrics as the task logs them, and what the report measured.

    Args:
        results: of a finished job.
        names: `test/acc`, `macs`, `latency_b1` and the like.

    Raises:
        JobError: there is none of such a name.
    """
    figures = {
        name.rpartition("/")[2]: value
        for side in ("dense/", "compressed/")  # the dense network's, where nothing was compressed
        for name, value in results["figures"].items()
        if name.startswith(side)
    }
    known = results["metrics"]["final"] | figures
    for name in names:
        if name not in known:
            raise JobError(
                f"`objective` must be one of {', '.join(known)}, or a list of them, got {name!r}"
                f"{did_you_mean(name, known)}"
            )
    return [known[name] for name in names]


def quieten() -> None:
    """Lightning 2.6 says this of itself, once in every process."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")


def _run(config: DictConfig, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    # Lightning takes seconds to load: not for a help text, a misspelt name or a job that is finished.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_compress.app.work import run

    quieten()
    try:
        require_numbers(config, "seed", "dense.max_epochs")
        return run(config, folder, about)
    except InstantiationException as error:
        where = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "configuration"
        kinds = other_kinds(about["overrides"]) if isinstance(error.__cause__, TypeError) else []
        raise JobError("; ".join(kinds) or f"{where}: {error.__cause__ or error}") from error
    except TypeError as error:
        kinds = other_kinds(about["overrides"])
        if not kinds:  # not the user's mistake: the traceback is wanted
            raise
        raise JobError("; ".join(kinds)) from error
    except (ValueError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
        raise JobError(str(error)) from error


def require_numbers(config: DictConfig, *names: str) -> None:
    """Raise unless settings are whole numbers; what else they are is found out late, and deep within Lightning.

    Args:
        config: a job's configuration.
        names: dotted names of settings.

    Raises:
        ValueError: one is something else.
    """
    for name in names:
        value = OmegaConf.select(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}")


if __name__ == "__main__":
    main()
