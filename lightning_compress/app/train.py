"""`lightning-compress`: the command line. One job, or with `-m` a sweep of them; what a job does is in `work`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_compress.app.jobs import Job, Metrics, config_digest, folder_name
from lightning_compress.app.libraries import offer_networks
from lightning_compress.app.sweep import SweepTable

__all__ = ["main"]

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("lightning_compress.folder", folder_name, replace=True)


class JobError(CompactHydraException):
    """What a user can mend: Hydra prints its message without a traceback."""


def main() -> None:
    """The console script."""
    offer_networks(sys.argv[1:])
    try:
        _hydra_main()
    finally:  # of a sweep with failures, too, one wants to see what was done
        SweepTable.show_pending()


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="train")
def _hydra_main(config: DictConfig) -> float:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        metrics = Job(folder, config_digest(config)).finished()
    except OmegaConfBaseException as error:  # a value that must be given, an interpolation that leads nowhere
        raise JobError("the configuration cannot be resolved:") from error  # Hydra prints the cause as well
    if metrics is None:
        metrics = _run(config, folder)
    else:
        log.info("finished before, nothing to do: %s", folder)
    if config.objective not in metrics["final"]:
        raise JobError(f"`objective` must be one of {', '.join(metrics['final'])}, got {config.objective!r}")
    return metrics["final"][config.objective]


def _run(config: DictConfig, folder: Path) -> Metrics:
    # Lightning takes seconds to load: not for a help text, a misspelt name or a job that is finished.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_compress.app.work import run

    # Lightning 2.6 says this of itself, once in every process
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")
    try:
        return run(config, folder)
    except InstantiationException as error:
        where = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else "configuration"
        raise JobError(f"{where}: {error.__cause__ or error}") from error
    except (ValueError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
        raise JobError(str(error)) from error


if __name__ == "__main__":
    main()
