"""`hydra/sweeper: pareto`: jobs that a search chooses; what it does is in `lightning_compress.app.search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

__all__ = ["ParetoSweeper"]


class ParetoSweeper(Sweeper):
    """Search for the networks that no other beats in all objectives; see `lightning_compress.app.search.Search`.

    Args:
        directions: "maximize" or "minimize", one for each name in `objective`.
        n_trials: how many jobs the search has in all; a search that was interrupted is brought to that number.
        n_jobs: how many are launched at a time. Side by side they run if the launcher does that.
        sampler: "nsgaii", "gp", "tpe" or "random".
        population: of a generation of NSGA-II.
        seed: of the sampler.
        storage: the file that remembers the trials.
        first: points to try first; what they leave out is sampled.
        params: overrides, with sweeps for what is searched.
    """

    def __init__(
        self,
        directions: Sequence[str],
        n_trials: int,
        n_jobs: int,
        sampler: str,
        population: int,
        seed: int,
        storage: str,
        first: Sequence[Mapping[str, Any]] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.directions, self.n_trials, self.n_jobs = list(directions), n_trials, n_jobs
        self.sampler, self.population, self.seed = sampler, population, seed
        self.storage, self.params = Path(storage), dict(params or {})
        self.first = [dict(point) for point in first]
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See Hydra."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Ask, launch and tell, until there are as many trials as wanted.

        The same command typed a second time meanwhile waits, and then finds all trials done.
        """
        # here: Hydra loads its plugins at every start
        from lightning_compress.app.jobs import alone

        with alone(self.storage.with_suffix(".lock"), f"searching, remembered in {self.storage}"):
            return self._search(arguments)

    def _search(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        from lightning_compress.app.search import Search, parse_space
        from lightning_compress.app.sweep import Sweep

        assert self.hydra_context is not None
        assert self.launcher is not None
        assert self.config is not None
        texts = [f"{name}={value}" for name, value in self.params.items()] + arguments
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(texts)
        space, fixed = parse_space(overrides)
        objective = OmegaConf.to_container(OmegaConf.create({"names": self.config.objective}))
        assert isinstance(objective, dict)
        names = [objective["names"]] if isinstance(objective["names"], str) else objective["names"]
        search = Search(
            space,
            dict(zip(names, self.directions, strict=False)) if len(names) == len(self.directions) else {},
            self.storage,
            about=[*fixed, f"objective={names}"],
            sampler=self.sampler,
            population=self.population,
            seed=self.seed,
            first=self.first,
        )
        Sweep.expect_less(search.told)
        returns = []
        while batch := search.ask(min(self.n_jobs, self.n_trials - search.told)):
            jobs = [[*fixed, *trial.overrides] for trial in batch]
            self.validate_batch_is_legal(jobs)
            done = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
            for trial, job in zip(batch, done, strict=True):
                search.tell(trial, job)
            returns.append(done)
        search.show()
        return returns
