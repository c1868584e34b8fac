"""The life of a sweep: who is at work, how far it is, and what it ends with."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_compress.app.about import describe
from lightning_compress.app.jobs import fail, write_json
from lightning_compress.app.progress import Progress
from lightning_compress.app.table import SweepJob, sweep_rows, sweep_table

__all__ = ["Sweep", "count_jobs"]


class Sweep(Callback):
    """A Hydra callback that shows how far a sweep is, and ends it with a table and a dashboard.

    Hydra tells `on_multirun_end` nothing of the jobs, which may have run in other processes. So each job leaves notes
    under a name that all jobs of one sweep share, and the sweep's own process gathers them.

    Args:
        name: resolved once for the whole sweep, e.g. `${now:...}`.
        dashboard: whether to write one.
    """

    _pending: ClassVar[_Pending | None] = None

    def __init__(self, name: str, dashboard: bool = True) -> None:
        self.name, self.dashboard = name, dashboard
        self._began = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Show from now on how far the sweep is."""
        folder = Path(config.hydra.sweep.dir)
        _remove_notes_of_the_dead(folder)
        Sweep._pending = _Pending(self.name, self._notes(config), config, self.dashboard)

    def on_job_start(self, config: DictConfig, **kwargs: object) -> None:
        """Leave a note that a sweep's job has begun."""
        self._began = time.time()
        number = config.hydra.job.get("num")  # a single run has none
        if number is not None:
            self._notes(config).mkdir(parents=True, exist_ok=True)
            write_json(self._notes(config) / f"{number:06d}.begun.json", {"at": self._began})

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Say in a job's folder what went wrong; leave a note of a sweep's job: its name, place and time."""
        error, folder = None, Path(config.hydra.runtime.output_dir)
        if job_return.status is JobStatus.FAILED:
            error = _said(job_return._return_value)
            fail(folder, error, describe(config.hydra))
        number = config.hydra.job.get("num")
        if number is not None:
            job = SweepJob(config.hydra.job.override_dirname, folder, error and error.partition("\n")[0])
            note = {**job._asdict(), "folder": str(folder), "seconds": time.time() - self._began}
            write_json(self._notes(config) / f"{number:06d}.json", note)

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the table."""
        self.end_pending()

    @classmethod
    def leave_out(cls, overrides: Sequence[str], reason: str) -> None:
        """Say in the table of the sweep that this process runs that a combination is none of its jobs, and why."""
        if Sweep._pending is not None:
            Sweep._pending.left_out.append(SweepJob(",".join(overrides), Path(), reason, left_out=True))
        cls.expect_less(1)

    @classmethod
    def expect_less(cls, count: int) -> None:
        """So many jobs of the sweep that this process runs were counted, and will not be run."""
        if Sweep._pending is not None:
            Sweep._pending.progress.expect_less(count)

    @classmethod
    def end_pending(cls) -> None:
        """Print the table of the sweep that this process ran and write its dashboard, unless that was done."""
        pending, Sweep._pending = Sweep._pending, None
        if pending is not None:
            pending.end()

    def _notes(self, config: DictConfig) -> Path:
        return Path(config.hydra.sweep.dir) / f"{NOTES}{self.name}"


def _said(raised: BaseException) -> str:
    """What an exception says, and its cause if that says more."""
    said, cause = str(raised) or type(raised).__name__, str(raised.__cause__ or "")
    return said if not cause or cause in said else f"{said}\n{cause}"


NOTES = ".sweep-"


class _Pending:
    """A sweep of this process. While it lives it holds a lock, by which others see that its notes are needed."""

    def __init__(self, name: str, notes: Path, config: DictConfig, dashboard: bool) -> None:
        self.name, self.notes, self.dashboard = name, notes, dashboard
        self.folder = Path(config.hydra.sweep.dir)
        self.board = (config.get("logger") or {}).get("wandb")
        self.left_out: list[SweepJob] = []
        notes.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(notes / "lock")
        self.lock.acquire()
        self.progress = Progress(notes, count_jobs(config))
        self.progress.start()

    def end(self) -> None:
        self.progress.stop()
        read = [json.loads(note.read_text()) for note in sorted(self.notes.glob("??????.json"))]
        jobs = [SweepJob(job["name"], Path(job["folder"]), job["error"]) for job in read]
        self.lock.release()
        shutil.rmtree(self.notes, ignore_errors=True)
        if not jobs and not self.left_out:  # what was asked for cannot be: that was said
            return
        console = Console()
        if not console.is_terminal:  # a log file wraps nothing
            console = Console(width=160)
        console.print(sweep_table([*jobs, *self.left_out]))
        console.print(f"Results: {self.folder.resolve()}", soft_wrap=True, highlight=False)
        if self.dashboard and jobs:
            console.print(_write_dashboard(self.folder), soft_wrap=True, highlight=False)
        if self.board and jobs:
            from lightning_compress.app.wandb_sweep import log_sweep

            board, group = self.board, self.board.group or self.name
            own = {"entity": board.entity, "offline": board.offline, "save_dir": self.folder}
            log_sweep(group, sweep_rows(jobs), board.project, **own)


def _write_dashboard(folder: Path) -> str:
    try:
        from lightning_compress.app.dashboard import write_dashboard

        return f"Dashboard: {write_dashboard(folder).resolve()}"
    except ModuleNotFoundError as error:
        return f'Dashboard: needs {error.name}, pip install "lightning-compress[dashboard]"'


def _remove_notes_of_the_dead(folder: Path) -> None:
    """A sweep that was killed leaves notes, and no lock."""
    for notes in folder.glob(f"{NOTES}*"):
        try:
            with FileLock(notes / "lock", timeout=0):
                shutil.rmtree(notes, ignore_errors=True)
        except Timeout:
            continue  # another sweep, at work in the same folder


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs a sweep will have, from its configuration; None: its sweeper knows.

    Args:
        config: what Hydra composes for a sweep, with its own node.
    """
    sweeper = config.hydra.sweeper
    trials = sweeper.get("n_trials")
    if trials is not None:
        return int(trials)
    params: Any = OmegaConf.to_container(sweeper.get("params") or OmegaConf.create({}), resolve=True)
    hydra = GlobalHydra.instance().hydra
    if hydra is None:
        return None
    texts = [f"{name}={value}" for name, value in params.items()] + list(config.hydra.overrides.task)
    values: dict[str, int] = {}
    try:
        for override in OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(texts):
            sweeps = override.is_sweep_override() and override.is_discrete_sweep()
            values[override.get_key_element()] = len(list(override.sweep_string_iterator())) if sweeps else 1
    except HydraException:  # the sweeper will say so, and better
        return None
    total = 1
    for count in values.values():
        total *= count
    return total
