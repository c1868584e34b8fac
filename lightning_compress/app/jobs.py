"""Where a job lives, and whether what lies there is finished, half-way or out of date.

Hydra has no resume of its own: here a job's folder is named by its overrides, so that the same command finds it
again, and a digest of its configuration says whether what is found still answers the question.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lightning_compress.files import write_atomic

__all__ = [
    "JOB",
    "RESULTS",
    "Job",
    "Metrics",
    "alone",
    "config_digest",
    "fail",
    "folder_name",
    "read_json",
    "write_json",
]

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]  # dense or final -> name -> value

# What changes where things are written, shown or picked, never what comes out.
_INDIFFERENT = (
    "output_dir",
    "cache_dir",
    "logger",
    "objective",
    "report.table",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)
RESULTS = "results.json"
JOB = "job.json"
_LONGEST = 120  # file systems stop at 255 bytes; checkpoints and W&B names want room


def folder_name(overrides: str) -> str:
    """A folder's name for a job, from Hydra's `override_dirname`.

    What does not fit a file name is replaced, what is too long is cut; then a hash of the whole keeps it unique.

    Example:
        >>> folder_name("arch=resnet20,method.budget.macs=0.5")
        'arch=resnet20,method.budget.macs=0.5'
        >>> folder_name("data.root=/some/where")
        'data.root=_some_where-850bebd6'
        >>> folder_name("")
        'default'
    """
    # sweepers write flags in Python's way, people in YAML's: one job, one folder
    overrides = re.sub(r"=(True|False)(?=,|$)", lambda flag: flag[0].lower(), overrides)
    name = re.sub(r"[^\w.,=+@-]", "_", overrides)[:_LONGEST]
    if name != overrides:
        name = f"{name}-{_digest(overrides)[:8]}"
    return name or "default"


def config_digest(config: DictConfig, names: Collection[str] | None = None, without: Collection[str] = ()) -> str:
    """A hash of what a configuration says, once resolved.

    Args:
        config: the job's configuration.
        names: the top-level nodes that count; by default all of them.
        without: dotted names that do not count, besides those of places, loggers and progress bars.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> config = OmegaConf.create({"seed": 1, "output_dir": "here", "arch": {"depth": "${seed}"}})
        >>> moved = OmegaConf.merge(config, {"output_dir": "there"})
        >>> other = OmegaConf.merge(config, {"seed": 2})
        >>> config_digest(config) == config_digest(moved), config_digest(config) == config_digest(other)
        (True, False)
    """
    skipped = {*_INDIFFERENT, *without}
    decisive: dict[str, Any] = {}
    for name in names if names is not None else map(str, config):
        if name in skipped:  # not even resolved: a logger's folder is known inside a job only
            continue
        node = config[name]
        decisive[name] = _plain(node) if OmegaConf.is_config(node) else node
        for dotted in skipped:
            top, _, key = dotted.partition(".")
            if top == name and isinstance(decisive[name], dict):
                decisive[name].pop(key, None)
    return _digest(json.dumps(decisive, sort_keys=True, default=str))[:12]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file so that whoever reads it sees all of it or none."""
    write_atomic(path, json.dumps(data, indent=2) + "\n")


@dataclass(frozen=True)
class Job:
    """A job's folder.

    Attributes:
        folder: where everything of it is written.
        digest: `config_digest` of its configuration.
    """

    folder: Path
    digest: str

    @property
    def artifact(self) -> Path:
        """The compressed network."""
        return self.folder / "compressed.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Where the newest state of the training is, until the job is finished."""
        return self.folder / "checkpoints"

    def finished(self) -> dict[str, Any] | None:
        """The results, if the job ran to its end with this very configuration."""
        results = read_json(self.folder / RESULTS)
        return results if results.get("config_digest") == self.digest else None

    def begin(self, about: Mapping[str, Any] | None = None) -> Path | None:
        """Make the folder ready.

        Args:
            about: what the job is called and how it is run, for those who read the folder later.

        Returns:
            The checkpoint to go on from; None for a start from the beginning. What another configuration left in
            the folder is removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if read_json(self.folder / JOB).get("config_digest") != self.digest:
            for stale in (self.checkpoints, self.folder / "metrics", self.folder / "pictures"):
                shutil.rmtree(stale, ignore_errors=True)
            for file in (self.artifact, self.folder / RESULTS):
                file.unlink(missing_ok=True)
        self._tell("running", None, about)
        last = self.checkpoints / "last.ckpt"
        return last if last.is_file() else None

    def finish(
        self,
        config: DictConfig,
        metrics: Metrics,
        figures: Mapping[str, float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Add what a job came to to the report's results; from here on it counts as finished.

        Args:
            config: the job's configuration.
            metrics: of the dense network and of the final one.
            figures: what the report measured, under flat names.
            about: as for `begin`.
        """
        results = read_json(self.folder / RESULTS)
        added = {"metrics": metrics, "figures": dict(figures or {}), "config": _plain(config)}
        write_json(self.folder / RESULTS, {**results, **added, "job": about, "config_digest": self.digest})
        self._tell("finished", None, about)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # a finished job resumes nothing

    def _tell(self, status: str, error: str | None, about: Mapping[str, Any] | None) -> None:
        own = {"config_digest": self.digest, "status": status, "error": error, "job": about}
        write_json(self.folder / JOB, own)


def fail(folder: Path, error: str, about: Mapping[str, Any]) -> None:
    """Say in a job's folder that it failed, and of what; what it can go on from stays.

    Args:
        folder: the job's.
        error: what was said.
        about: as for `Job.begin`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JOB, {**read_json(folder / JOB), "status": "failed", "error": error, "job": about})


@contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Let one process at a time into the block; the others wait, and say what for.

    Of the processes of one distributed job only the first asks: it waits inside for the others to join it.

    Args:
        path: a file to lock; it is made.
        doing: what the other process is doing.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is %s; waiting for it", doing)
        held = lock.acquire()
    with held:
        yield


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty if there is none."""
    data: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return data


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
