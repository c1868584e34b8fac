from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_compress.app.dashboard.curves import read_curves
from lightning_compress.app.dashboard.gather import Run, find_jobs, gather, read_run
from lightning_compress.app.dashboard.quantities import describe
from lightning_compress.results import Results
from tests.app.dashboard import folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {run.folder.name: run for run in gather(folders.sweep(tmp_path_factory.mktemp("sweep")))}


def test_statuses(runs: dict[str, Run]) -> None:
    statuses = [run.status for run in runs.values()]

    assert {status: statuses.count(status) for status in set(statuses)} == {
        "finished": 20,
        "failed": 2,
        "unfinished": 1,
        "unreadable": 1,
    }
    assert runs["failed1"].error == "out of memory"
    assert runs["failed0"].command == "lightning-compress arch=alexnet0 seed=1"
    assert "results.json is not JSON" in runs["damaged"].error


def test_figures_are_those_of_the_report(runs: dict[str, Run]) -> None:
    run = runs["vgg_small-low_rank-0.25"]
    reported = Results.from_json(folders.results("vgg_small", "low_rank", 0.25))
    known = {quantity.key: quantity for quantity in reported.quantities()}

    for key in ("macs", "params", "bytes", "peak_memory", "latency_b1", "latency_b32", "cpu_time_b1"):
        assert run.dense[key] == known[key].dense
        assert run.final[key] == known[key].compressed
    assert run.final["test/acc"] == pytest.approx(0.99 - 0.05 * 0.75**2 + 0.01)
    assert run.budgets == [{"unit": "macs", "callback": "ChannelPruning", "requested": 0.25, "reached": 0.25}]


def test_labels_of_quantities_are_those_of_the_report() -> None:
    reported = Results.from_json(folders.results("lenet5", "low_rank", 0.5)).quantities()
    ours = {entry["key"]: entry["label"] for entry in describe(quantity.key for quantity in reported)}

    for quantity in reported:
        if quantity.kind in ("count", "bytes", "ms"):
            assert quantity.label.startswith(ours[quantity.key])  # ours go without the number of threads


def test_what_a_run_is_called(runs: dict[str, Run]) -> None:
    run = runs["vgg_small-low_rank-0.25"]

    assert (run.arch, run.method, run.data, run.seconds) == ("vgg_small", "low_rank", "digits", 12.5)
    assert run.label == "vgg_small, low_rank, budget.macs=0.25"


def test_uncompressed_runs_have_the_dense_costs(runs: dict[str, Run]) -> None:
    run = runs["arch=lenet5,method=none"]

    assert not run.compressed
    assert run.final["macs"] == run.dense["macs"]


def test_a_report_of_plain_lightning(tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    for name in ("metrics", "config", "config_digest", "job"):
        del found[name]
    [run] = gather(folders.write(tmp_path, "results.json", found))

    assert (run.status, run.arch, run.method) == ("finished", "net", "low_rank")
    assert run.final["val/acc"] == found["metric"]["compressed"]


def test_what_has_no_job_is_read_off_the_folders_name(tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    del found["job"]
    run = read_run(folders.write(tmp_path / "arch=resnet20,method=low_rank_cp,x=[1,2]", "results.json", found))

    assert (run.arch, run.method) == ("resnet20", "low_rank_cp")


def test_recipes_and_distillation_are_methods(tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    found["job"]["choices"] |= {"recipe": "deep_compression", "distill": "self"}

    assert read_run(folders.write(tmp_path, "results.json", found)).method == "deep_compression + distill=self"


def test_a_job_between_its_report_and_its_end_is_not_finished(tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    del found["metrics"]
    folders.write(tmp_path, "results.json", found)
    folders.write(tmp_path, "job.json", {"config_digest": "0"})

    assert read_run(tmp_path).status == "unfinished"


def test_results_outweigh_the_job(tmp_path: Path) -> None:
    folders.write(tmp_path, "results.json", folders.results("lenet5", "low_rank", 0.5))
    folders.write(tmp_path, "job.json", {"config_digest": "0", "status": "running", "error": None})

    assert read_run(tmp_path).status == "finished"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 7}, "expected format 1, got 7"),
        ({"dense": [1]}, "`dense`: expected an object, got a list"),
        ({"dense": None, "metrics": {}, "metric": None}, "`dense` has no figures"),
        ({"layers": [{"tensor": "a"}]}, "`layers`"),
        ({"layers": [{"tensor": 3, "before": 1, "after": 2}]}, "`layers`"),
        ({"budgets": [{}]}, "`requested` must be a number"),
        ({"budgets": "none"}, "`budgets`: expected a list of objects, got a string"),
        ({"metrics": {"final": 3}}, "`final`: expected an object, got a number"),
        ({"job": "x"}, "`job`: expected an object, got a string"),
    ],
)
def test_damaged_files_say_why(tmp_path: Path, change: folders.Json, reason: str) -> None:
    run = read_run(folders.write(tmp_path, "results.json", {**folders.results("lenet5", "low_rank", 0.5), **change}))

    assert run.status == "unreadable"
    assert reason in run.error


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"format": 1}'])
def test_files_that_are_no_results(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)

    assert read_run(tmp_path).status in ("unreadable", "unfinished")


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    found["metrics"]["final"]["test/loss"] = math.nan

    assert "test/loss" not in read_run(folders.write(tmp_path, "results.json", found)).final


def test_hidden_folders_and_the_cache_are_not_searched(tmp_path: Path) -> None:
    for name in (".trash", "cache", "a/b"):
        folders.write(tmp_path / name, "job.json", {})

    assert list(find_jobs(tmp_path)) == [tmp_path / "a" / "b"]


def test_runs_that_are_called_alike_are_told_apart(tmp_path: Path) -> None:
    for name in ("first/a", "second/a"):
        folders.write(tmp_path / name, "results.json", folders.results("lenet5", "low_rank", 0.5))

    assert {run.label.rpartition(" ")[2] for run in gather(tmp_path)} == {"(first)", "(second)"}


def test_the_later_version_of_a_curve_counts(runs: dict[str, Run]) -> None:
    steps, values = runs["lenet5-channel_pruning-0.5"].details.curves["train/loss"]

    assert steps == [0, 10, 20, 30]
    assert values[2] == pytest.approx(1 / 22, rel=1e-4)


def test_curves_are_thinned_and_damage_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "metrics" / "version_0"
    folder.mkdir(parents=True)
    rows = [f"{step},{step},{step}" for step in range(1000)]
    (folder / "metrics.csv").write_text("\n".join(["step,a,b", *rows, "x,1,2", "\0", "1001,nan,", "1002", "1,2,3,4,5"]))
    curves = read_curves(tmp_path, points=100)

    assert len(curves["a"][0]) == 100
    assert curves["a"][0][-1] == 999


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; import lightning_compress.app.dashboard; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"torch", "lightning", "plotly", "hydra", "numpy"} & set(done.stdout.split())


def test_gathering_gives_json(runs: dict[str, Run]) -> None:
    assert json.dumps(runs["lenet5-channel_pruning-0.5"].details.layers)
