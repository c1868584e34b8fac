"""Search: jobs whose settings Optuna chooses, for the front of what is accurate and small at the same time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from lightning_compress.extras import require_extra

__all__ = ["Search", "Trial", "parse_space"]

SAMPLERS = ("nsgaii", "gp", "tpe", "random")
DIGITS = 4
"""Significant digits of a sampled number: more would only make folders' names long."""


@dataclass(frozen=True)
class Trial:
    """A point of the space, to be tried.

    Attributes:
        number: counted from 0 over the whole search.
        overrides: the point, as Hydra's overrides.
    """

    number: int
    overrides: list[str]


def parse_space(overrides: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """The searched part of Hydra's overrides, and the rest.

    `choice(...)`, `glob(...)` and comma-separated values are choices; `interval(a, b)` is continuous, of integers with
    `int(interval(a, b))`; `tag(log, interval(a, b))` is searched on a logarithmic scale; `range(a, b, step)` is a grid.

    Args:
        overrides: parsed ones; the last of a name counts.

    Returns:
        Name -> Optuna's distribution, and the overrides that are the same in all trials.

    Raises:
        HydraException: nothing is to be searched.
    """
    space: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        name = override.get_key_element()
        space.pop(name, None)
        fixed.pop(name, None)
        if override.is_sweep_override():
            space[name] = _distribution(override)
        else:
            fixed[name] = f"{name}={override.get_value_element_as_str()}"
    if not space:
        raise HydraException(
            "there is nothing to search: give some values as choice(...), interval(...) or range(...), for example "
            "'method.budget.macs=interval(0.1, 0.9)'"
        )
    return space, list(fixed.values())


def _distribution(override: Override) -> Any:
    optuna = require_extra("optuna.distributions", "search")
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        whole = {type(value.start), type(value.end)} == {int}  # Hydra types them as floats, and int(...) makes integers
        kind = optuna.IntDistribution if whole else optuna.FloatDistribution
        return kind(value.start, value.end, log=log)
    if override.is_discrete_sweep():
        return optuna.CategoricalDistribution(list(override.sweep_string_iterator()))
    raise HydraException(f"{override.input_line} cannot be searched: give choice(...), interval(...) or range(...)")


class Search:
    """An Optuna study that is stored on disk, and goes on exactly where it was.

    NSGA-II (Deb et al. 2002, 'A fast and elitist multiobjective genetic algorithm: NSGA-II') by default, whose children
    lie near their parents (simulated binary crossover, Deb and Agrawal 1995). Trials are
    seeded one by one, so that a search that was killed and started again takes the course of one that was not: with the
    seed, what has been told so far decides. Another question (space, objectives, sampler, seed or fixed settings) in
    the same file is another study.

    Args:
        space: name -> Optuna's distribution, of `parse_space`.
        objectives: name -> "maximize" or "minimize".
        storage: a file; its folder is made.
        about: what else makes this search what it is.
        sampler: "nsgaii", "gp" (a Gaussian process and the expected hypervolume improvement, Daulton et al. 2020,
            'Differentiable Expected Hypervolume Improvement'), "tpe" or "random".
        population: of a generation of NSGA-II; the first is drawn at random.
        seed: of the sampler.
        first: points to try first; what they leave out is sampled.

    Raises:
        HydraException: an argument that cannot be right.

    Example:
        >>> import tempfile, optuna
        >>> space = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
        >>> folder = Path(tempfile.mkdtemp())
        >>> search = Search(space, {"loss": "minimize"}, folder / "search.journal", first=[{"x": 0.25}])
        >>> [trial.overrides for trial in search.ask(1)]
        [['x=0.25']]
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        objectives: Mapping[str, str],
        storage: Path,
        about: Sequence[str] = (),
        sampler: str = "nsgaii",
        population: int = 10,
        seed: int = 0,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.optuna = require_extra("optuna", "search")
        if not objectives or set(objectives.values()) - {"minimize", "maximize"}:
            raise HydraException(
                "each name in `objective` needs one of maximize, minimize in `hydra.sweeper.directions`, in the same "
                f"order; got {dict(objectives) or 'different numbers of them'}"
            )
        if sampler not in SAMPLERS:
            raise HydraException(f"`hydra.sweeper.sampler` must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if population < 2:
            raise HydraException(f"`hydra.sweeper.population` must be at least 2, got {population}")
        unknown = sorted({name for point in first for name in point} - set(space))
        if unknown:
            raise HydraException(
                f"`hydra.sweeper.first` names {', '.join(unknown)}, but searched are {', '.join(space)}; give "
                "first=[] if the space is another one"
            )
        self.space, self.objectives, self.first = dict(space), dict(objectives), [dict(point) for point in first]
        self.sampler, self.population, self.seed = sampler, population, seed
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)  # the sweep has a progress line of its own
        self.study = self._open(storage, about)

    @property
    def told(self) -> int:
        """How many trials have ended, failed ones too."""
        return sum(trial.state.is_finished() for trial in self.study.trials)

    def ask(self, count: int) -> list[Trial]:
        """The next points to try: first those that an interrupted search was at.

        Args:
            count: how many; 0 or less: none.
        """
        running = self.optuna.trial.TrialState.RUNNING
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == running]
        asked = [self._point(self.optuna.trial.Trial(self.study, trial._trial_id)) for trial in begun[: max(count, 0)]]
        while len(asked) < count:
            self.study.sampler = self._make_sampler(len(self.study.get_trials(deepcopy=False)))
            asked.append(self._point(self.study.ask()))
        return asked

    def tell(self, trial: Trial, job: JobReturn) -> None:
        """What a trial came to; one whose job failed counts as failed."""
        if job.status is JobStatus.COMPLETED:
            value = job.return_value
            self.study.tell(trial.number, [value] if isinstance(value, float) else value)
        else:
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)

    def front(self) -> list[tuple[dict[str, Any], list[float]]]:
        """Points that no other beats in all objectives, and their values, by the last objective."""
        best = {json.dumps(trial.params, sort_keys=True): trial for trial in self.study.best_trials}
        return sorted(((dict(t.params), list(t.values)) for t in best.values()), key=lambda found: found[1][-1])

    def show(self) -> None:
        """Print the front."""
        table = Table(title=f"the front of {self.told} trials", title_justify="left")
        for name in (*self.objectives, *self.space):
            table.add_column(name, justify="right" if name in self.objectives else "left", overflow="fold")
        for point, values in self.front():
            table.add_row(*(f"{value:.4g}" for value in values), *(_text(point[name]) for name in self.space))
        Console().print(table)

    def _open(self, storage: Path, about: Sequence[str]) -> Any:
        storage.parent.mkdir(parents=True, exist_ok=True)
        space = {name: self.optuna.distributions.distribution_to_json(own) for name, own in self.space.items()}
        question = [space, self.objectives, self.sampler, self.population, self.seed, self.first, list(about)]
        journal = self.optuna.storages.journal
        lock = journal.JournalFileOpenLock(str(storage))  # of a process that was killed it is taken over after 30 s
        study = self.optuna.create_study(
            study_name=hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12],
            storage=self.optuna.storages.JournalStorage(journal.JournalFileBackend(str(storage), lock_obj=lock)),
            directions=list(self.objectives.values()),
            load_if_exists=True,
        )
        if not study.get_trials(deepcopy=False):
            for point in self.first:
                study.enqueue_trial({name: self._inside(name, value) for name, value in point.items()})
        return study

    def _inside(self, name: str, value: Any) -> Any:
        own = self.space[name]
        value = str(value) if isinstance(own, self.optuna.distributions.CategoricalDistribution) else value
        if not own._contains(own.to_internal_repr(value)):
            raise HydraException(f"`hydra.sweeper.first` has {name}={value}, which is not in {own}")
        return value

    def _point(self, trial: Any) -> Trial:
        values = {name: trial._suggest(name, own) for name, own in self.space.items()}
        return Trial(trial.number, [f"{name}={_text(value)}" for name, value in values.items()])

    def _make_sampler(self, number: int) -> Any:
        samplers, seed = self.optuna.samplers, 100_003 * self.seed + number
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self.sampler == "tpe":
            return samplers.TPESampler(seed=seed)
        if self.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=self.population)
        # Optuna's default crossover only swaps the parents' values: with four numbers it tries the same ones again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)  # so since 2022
            crossover = samplers.nsgaii.SBXCrossover()
        return samplers.NSGAIISampler(population_size=self.population, crossover=crossover, seed=seed)


def _text(value: Any) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
