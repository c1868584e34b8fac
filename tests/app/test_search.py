"""Searches: what is searched, the course that one takes, and that a killed one takes the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException

from lightning_compress.app.search import Search, Trial, parse_space
from lightning_compress.app.train import JobError, objectives
from tests.app.test_sweep import SMALL, command

BOTH = {"accuracy": "maximize", "macs": "minimize"}


def space(*overrides: str) -> tuple[dict[str, Any], list[str]]:
    return parse_space(OverridesParser.create().parse_overrides(list(overrides)))


def opened(folder: Path, **changes: Any) -> Search:
    searched, fixed = space("x=interval(0.0, 1.0)", "y=choice(a,b,c)", "seed=1")
    settings: dict[str, Any] = {"population": 4, "first": [{"x": 0.5}], "about": fixed} | changes
    return Search(searched, BOTH, folder / "search.journal", **settings)


def work(trial: Trial) -> JobReturn:
    """A job whose accuracy rises with its cost, for some more than for others."""
    values = dict(override.split("=") for override in trial.overrides)
    x, y = float(values["x"]), "abc".index(values["y"])
    done = JobReturn()
    done.status, done.return_value = JobStatus.COMPLETED, [x ** (1 + y), x]
    return done


def course(search: Search) -> list[tuple[dict[str, Any], list[float] | None]]:
    return [(trial.params, trial.values) for trial in search.study.trials]


def test_the_space_is_what_sweeps() -> None:
    found, fixed = space(
        "a=interval(0.1, 0.9)", "b=int(interval(2, 8))", "c=tag(log, interval(1e-4, 1e-1))", "d=choice(l1,l2)", "e=x,y",
        "f=range(0, 3)", "g=7", "d=choice(l2,fpgm)",
    )  # fmt: skip
    distributions = optuna.distributions
    assert found == {
        "a": distributions.FloatDistribution(0.1, 0.9),
        "b": distributions.IntDistribution(2, 8),
        "c": distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "d": distributions.CategoricalDistribution(["l2", "fpgm"]),
        "e": distributions.CategoricalDistribution(["x", "y"]),
        "f": distributions.CategoricalDistribution(["0", "1", "2"]),
    }
    assert fixed == ["g=7"]


@pytest.mark.parametrize("sampler", ["nsgaii", "gp", "tpe", "random"])
def test_a_search_that_is_interrupted_takes_the_course_of_one_that_is_not(tmp_path: Path, sampler: str) -> None:
    whole = opened(tmp_path / "whole", sampler=sampler)
    for _ in range(14):
        [trial] = whole.ask(1)
        whole.tell(trial, work(trial))

    for number in range(14):
        search = opened(tmp_path / "killed", sampler=sampler)  # a process each
        assert search.told == number
        asked = search.ask(1)
        if number % 3 == 1:  # killed while the job runs
            search = opened(tmp_path / "killed", sampler=sampler)
            assert search.ask(1) == asked
        search.tell(asked[0], work(asked[0]))
    assert course(search) == course(whole)
    assert course(whole)[0][0]["x"] == 0.5
    assert len({point["x"] for point, _ in course(whole)}) > 5


def test_the_front_is_what_nothing_beats(tmp_path: Path) -> None:
    search = opened(tmp_path, sampler="random")
    for trial in search.ask(12):
        search.tell(trial, work(trial))
    values = [tuple(trial.values) for trial in search.study.trials]
    beaten = {(a, m) for a, m in values if any((b >= a and n <= m) and (b, n) != (a, m) for b, n in values)}
    assert [tuple(own) for _, own in search.front()] == sorted(set(values) - beaten, key=lambda own: own[1])
    assert beaten


def test_a_failed_job_counts_and_is_on_no_front(tmp_path: Path) -> None:
    search = opened(tmp_path)
    failed = JobReturn()
    failed.status, failed._return_value = JobStatus.FAILED, ValueError("no")
    for trial in search.ask(2):
        search.tell(trial, failed)
    assert (search.told, search.front(), search.ask(0)) == (2, [], [])


def test_another_question_is_another_study(tmp_path: Path) -> None:
    search = opened(tmp_path)
    search.tell(search.ask(1)[0], work(Trial(0, ["x=0.5", "y=a"])))
    assert opened(tmp_path).told == 1
    assert [opened(tmp_path, **change).told for change in ({"seed": 1}, {"about": ["seed=2"]}, {"first": []})] == [
        0
    ] * 3


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda folder: space("seed=1"), "nothing to search"),
        (lambda folder: opened(folder, sampler="grid"), "one of nsgaii, gp, tpe, random, got 'grid'"),
        (lambda folder: opened(folder, population=1), "at least 2, got 1"),
        (lambda folder: opened(folder, first=[{"z": 1}]), "names z, but searched are x, y"),
        (lambda folder: opened(folder, first=[{"x": 2.0}]), "x=2.0, which is not in"),
        (lambda folder: Search(space("x=1,2")[0], {}, folder / "s"), "different numbers of them"),
        (lambda folder: Search(space("x=1,2")[0], {"acc": "up"}, folder / "s"), "one of maximize, minimize"),
    ],
    ids=["space", "sampler", "population", "unknown", "outside", "objectives", "direction"],
)
def test_a_mistake_is_named(tmp_path: Path, build: Any, said: str) -> None:
    with pytest.raises(HydraException, match=said):
        build(tmp_path)


def test_objectives_are_metrics_and_figures_of_the_final_network() -> None:
    results = {"metrics": {"final": {"val/acc": 0.5}}, "figures": {"dense/macs": 8.0, "compressed/macs": 4.0}}
    assert objectives(results, ["val/acc", "macs"]) == [0.5, 4.0]
    dense = {**results, "figures": {"dense/macs": 8.0}}
    assert objectives(dense, ["macs"]) == [8.0]
    with pytest.raises(JobError, match="one of val/acc, macs, or a list of them, got 'acc'"):
        objectives(results, ["acc"])


def test_the_command_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [*SMALL, "pictures=null", "sweep=pareto", "hydra.sweeper.population=2"]
    first = command(tmp_path, *arguments, "hydra.sweeper.n_trials=2")
    assert first.returncode == 0, first.stderr
    assert "2 of 2 done" in first.stderr
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    with ThreadPoolExecutor() as typed_twice:  # one of them waits for the other
        more = list(typed_twice.map(lambda _: command(tmp_path, *arguments, "hydra.sweeper.n_trials=3"), range(2)))
    for search in more:
        assert search.returncode == 0, search.stderr
        assert "the front of 3 trials" in search.stdout
    assert sum("sweep: 1 of 1 done" in search.stderr for search in more) == 1
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert len(list(tmp_path.rglob("results.json"))) == 3
