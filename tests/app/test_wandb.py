"""What W&B is told of jobs and sweeps: read back from offline runs, and from a server on this machine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces
from omegaconf import DictConfig

from lightning_compress.app import wandb_report, work
from lightning_compress.app.wandb_sweep import log_sweep
from tests.app.fake_wandb import ENTITY, KEY, FakeWandb, environment, serving

SMALL = [
    *("trainer=debug", "trainer.max_epochs=2", "dense.max_epochs=1", "report.latency=false", "report.table=false"),
    *("logger=wandb", "logger.wandb.project=proj"),
]
Records = list[dict[str, Any]]


def python(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`; what ends badly says why."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, **environment(folder), **changes},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@functools.cache  # a run that has ended
def records(folder: Path) -> Records:
    """The records of an offline run."""
    done = python(folder, "-m", "wandb", "leet", "inspect", "--json", str(folder))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(found: Records, kind: str) -> Records:
    return [record[kind] for record in found if record["type"] == kind]


def summary(found: Records) -> dict[str, Any]:
    return {key: value for record in of_kind(found, "summary") for key, value in record["update"].items()}


def config(found: Records) -> dict[str, Any]:
    """Of all records that changed it, by dotted names."""
    flat: dict[str, Any] = {}

    def flatten(node: Any, name: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                flatten(value, f"{name}.{key}".lstrip("."))
        else:
            flat[name] = node

    for update in [*(r["config"] for r in of_kind(found, "run") if "config" in r), *of_kind(found, "config")]:
        flatten(update.get("update", {}), "")
    return flat


def offline_runs(folder: Path) -> list[Path]:
    """Of jobs; that of the sweep itself lies beside their folders."""
    return sorted(run for run in folder.rglob("offline-run-*") if run.parents[1].name != "outputs")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of four jobs, run by one process."""
    folder = tmp_path_factory.mktemp("sweep")
    swept = ["arch=lenet5,lenet300100", "method=channel_pruning,weight_sharing", "distill=none"]
    done = python(folder, "-m", "lightning_compress.app.train", "-m", *SMALL, *swept)
    assert done.returncode == 0, done.stderr
    return folder


def test_four_jobs_of_one_process_are_four_runs(sweep: Path) -> None:
    runs = [records(folder) for folder in offline_runs(sweep)]
    assert len(runs) == 4
    heads = [of_kind(run, "run")[0] for run in runs]
    [group] = {head["run_group"] for head in heads}
    assert {head["project"] for head in heads} == {"proj"}
    assert len({head["run_id"] for head in heads}) == 4
    jobs = {(head["tags"][0], head["job_type"]) for head in heads}
    assert jobs == {(a, m) for a in ("lenet5", "lenet300100") for m in ("channel_pruning", "weight_sharing")}
    for head, run in zip(heads, runs, strict=True):
        arch, method = head["tags"][0], head["job_type"]
        assert head["tags"] == [arch, method, "digits"]
        assert head["display_name"].startswith(f"arch={arch},dense.max_epochs=1,distill=none,method={method}")
        told = config(run)
        assert (told["group"], told["job_type"], told["choices.arch"]) == (group, method, arch)
        assert told["method._target_"].startswith("lightning_compress.")
        assert (told["trainer.max_epochs"], told["data.batch_size"], told["seed"]) == (2, 64, 42)
        assert not [value for value in told.values() if isinstance(value, str) and "${" in value]
        [end] = of_kind(run, "exit")
        assert end.get("exit_code", 0) == 0


def test_a_sweep_of_the_command_ends_with_a_run_that_shows_its_jobs(sweep: Path) -> None:
    [folder] = (sweep / "outputs" / "wandb").glob("offline-run-*")
    run = records(folder)
    head = of_kind(run, "run")[0]
    groups = {of_kind(records(job), "run")[0]["run_group"] for job in offline_runs(sweep)}
    assert (head["job_type"], {head["run_group"]}) == ("sweep", groups)
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    jobs = tables[0]
    assert jobs["columns"] == ["job", "arch", "method", "accuracy", "macs", "params", "bytes", "error"]
    assert {tuple(row[1:3]) for row in jobs["data"]} == {
        (arch, method) for arch in ("lenet5", "lenet300100") for method in ("channel_pruning", "weight_sharing")
    }
    assert all(0 <= row[3] <= 1 and row[4] > 0 and row[7] is None for row in jobs["data"])
    assert len(tables) == 3  # and one for each scatter


def test_a_run_holds_the_jobs_figures_curves_table_pictures_and_artifact(sweep: Path) -> None:
    for folder in offline_runs(sweep):
        run, job = records(folder), folder.parents[1]
        head, told = of_kind(run, "run")[0], summary(run)
        results = json.loads((job / "results.json").read_text())
        assert told["compress/macs"] == results["compressed"]["macs"]
        assert (
            told["compress/bytes"] == results["compressed"]["bytes"] == (job / "compressed.safetensors").stat().st_size
        )
        assert told["compress/dense/macs"] == results["dense"]["macs"]
        assert told["final/test/acc"] == pytest.approx(results["metrics"]["final"]["test/acc"])
        steps = {metric["name"]: metric.get("step_metric") for metric in of_kind(run, "metric") if "name" in metric}
        assert steps["compress/macs"] == steps["compress/bytes"] == steps["val/acc"] == "epoch"
        assert not [metric for metric in of_kind(run, "metric") if "summary" in metric]

        history = [record["item"] for record in of_kind(run, "history")]
        macs = [row["compress/macs"] for row in history if "compress/macs" in row]
        assert macs[0] == results["dense"]["macs"]
        assert macs[-1] == results["compressed"]["macs"]
        assert all("epoch" in row for row in history if "compress/macs" in row)
        assert len([row for row in history if "val/acc" in row]) == 2

        artifacts = {artifact["name"]: artifact for artifact in of_kind(run, "artifact")}
        method = head["job_type"]
        kept = artifacts[f"{head['tags'][0]}-{method}"]
        assert kept["type"] == "model"
        assert set(kept["aliases"]) == {"latest", "compressed"}
        assert {file["path"] for file in kept["manifest"]["contents"]} == {"compressed.safetensors", "results.json"}
        metadata = json.loads(kept["metadata"])
        assert metadata["compress/macs"] == told["compress/macs"]
        assert metadata["final/val/acc"] == results["metrics"]["final"]["val/acc"]

        tables = [json.loads(path.read_text()) for path in folder.rglob("media/table/compress/layers*.json")]
        if method == "channel_pruning":
            [table] = tables
            assert table["columns"] == ["tensor", "before", "after", "macs before", "macs after"]
            assert [row[0] for row in table["data"]] == [layer["tensor"] for layer in results["layers"]]
            assert table["data"][0][1] == "×".join(map(str, results["layers"][0]["before"]))
        drawn = {path.name.partition("_")[0] for path in folder.rglob("media/images/compress/*.png")}
        assert drawn == ({"filters"} if (job / "pictures" / "filters.png").is_file() else set())
        assert (job / "metrics" / "version_0" / "metrics.csv").is_file()


def test_a_job_that_fails_is_a_failed_run_and_has_no_group(
    tmp_path: Path, job: Callable[..., DictConfig], wandb_alone: None
) -> None:
    own = ["logger=wandb", "~logger.csv", f"logger.wandb.save_dir={tmp_path}", "logger.wandb.name=doomed"]
    with pytest.raises(ValueError, match="lowest reachable"):
        work.run(job(*own, "method.budget.macs=0.0001", "dense.max_epochs=1"), tmp_path / "job")
    [folder] = offline_runs(tmp_path)
    found = records(folder)
    assert of_kind(found, "exit")[0]["exit_code"] == 1
    assert "run_group" not in of_kind(found, "run")[0]
    assert config(found)["method.budget.macs"] == 0.0001
    assert not of_kind(found, "artifact")


def test_a_sweep_ends_with_a_run_that_shows_its_jobs(tmp_path: Path, wandb_alone: None) -> None:
    rows = [
        {"job": "a", "accuracy": 0.9, "macs": 100.0, "bytes": 10.0},
        {"job": "b", "accuracy": 0.8, "macs": 50.0, "bytes": None},
        {"job": "c", "error": "no such thing"},
    ]
    log_sweep("tonight", rows, "proj", save_dir=tmp_path)
    [folder] = offline_runs(tmp_path)
    found = records(folder)
    head = of_kind(found, "run")[0]
    assert (head["run_group"], head["job_type"], head["display_name"]) == ("tonight", "sweep", "tonight")
    assert config(found)["jobs"] == 3
    by_columns = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    assert sorted(len(table["data"]) for table in by_columns) == [1, 2, 3]
    [whole] = [table for table in by_columns if len(table["data"]) == 3]
    assert whole["columns"] == ["job", "accuracy", "macs", "bytes", "error"]
    assert whole["data"][2] == ["c", None, None, None, "no such thing"]
    plots = {key: value for key, value in config(found).items() if "visualize" in key}
    assert "wandb/scatter/v0" in plots.values()

    with pytest.raises(ValueError, match=r"`y` must be a column of the rows \(job\), got 'accuracy'"):
        log_sweep("tonight", [{"job": "a"}], "proj", save_dir=tmp_path)
    assert len(offline_runs(tmp_path)) == 1


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with serving() as fake:
        yield fake
    assert fake.unknown == []


def online(fake: FakeWandb) -> dict[str, str]:
    return {"WANDB_BASE_URL": fake.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}


def test_a_job_is_logged_to_a_server_where_there_is_a_key(tmp_path: Path, server: FakeWandb) -> None:
    job = ["arch=lenet5", "arch.width=0.3", "recipe=deep_compression"]
    done = python(tmp_path, "-m", "lightning_compress.app.train", *SMALL, *job, **online(server))
    assert done.returncode == 0, done.stderr
    assert not offline_runs(tmp_path)
    [run] = server.runs.values()
    [path] = tmp_path.rglob("results.json")
    results = json.loads(path.read_text())
    assert run.fields["project"] == "proj"
    assert run.fields["jobType"] == "deep_compression"
    assert run.fields["tags"] == ["lenet5", "deep_compression", "digits"]
    assert "groupName" not in run.fields
    assert run.config["group"] is None
    assert run.config["recipe"]["pruning"]["_target_"] == "lightning_compress.WeightPruning"
    assert run.exit_code == 0
    assert run.summary["compress/bytes"] == results["compressed"]["bytes"]
    assert [row["epoch"] for row in run.history if "val/acc" in row] == [0, 1]
    assert any("media/images/compress/filters" in file for file in run.files)
    [kept] = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    assert kept["artifactCollectionName"] == "lenet5-deep_compression"
    assert kept["committed"]
    sent = {name.rpartition("/")[2]: content for name, content in server.uploads.items() if "artifact/" in name}
    assert sent["compressed.safetensors"] == path.with_name("compressed.safetensors").read_bytes()
    assert sent["results.json"] == path.read_bytes()


def test_an_offline_run_can_be_synced_later(sweep: Path, server: FakeWandb) -> None:
    folder = offline_runs(sweep)[0]
    head, told = of_kind(records(folder), "run")[0], summary(records(folder))
    done = python(sweep, "-m", "wandb", "sync", str(folder), **online(server))
    assert done.returncode == 0, done.stderr
    [(name, run)] = server.runs.items()
    assert name == head["run_id"]
    assert (run.fields["groupName"], run.fields["jobType"]) == (head["run_group"], head["job_type"])
    assert run.config["choices"]["arch"] == head["tags"][0]
    assert run.summary["compress/macs"] == told["compress/macs"]
    assert len([row for row in run.history if "val/acc" in row]) == 2
    assert run.exit_code == 0
    [kept] = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    assert kept["committed"]


def panels(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    [grid] = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return {panel["viewType"]: panel["config"] for panel in grid["panelBankSectionConfig"]["panels"]}


def filters(spec: dict[str, Any]) -> set[tuple[str, str, str]]:
    [grid] = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    [runs] = grid["runSets"]
    return {(rule["key"]["name"], rule["op"], rule["value"]) for rule in runs["filters"]["filters"]}


@pytest.mark.usefixtures("wandb_alone")
def test_a_report_can_be_seen_without_a_login(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_report.main(["--project", "proj", "--group", "tonight", "--dry-run"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert filters(spec) == {("group", "=", "tonight"), ("jobType", "!=", "sweep")}
    shown = panels(spec)
    assert set(shown) == {"Scatter Plot", "Parallel Coordinates Plot", "Bar Chart", "Run History Line Plot"}
    assert shown["Scatter Plot"]["yAxis"] == "summary:final/test/acc"
    assert "config:choices.value.arch" in {c["accessor"] for c in shown["Parallel Coordinates Plot"]["columns"]}
    wandb_report.main(["--project", "proj", "--dry-run"])
    assert filters(json.loads(capsys.readouterr().out)) == {("jobType", "!=", "sweep")}


@pytest.mark.usefixtures("wandb_alone")
@pytest.mark.parametrize(
    ("package", "said"),
    [(wandb_workspaces, "needs a login: run `wandb login`"), (None, 'pip install "lightning-compress[wandb]"')],
    ids=["login", "package"],
)
def test_what_a_report_lacks_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: Any, said: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", package)
    with pytest.raises(SystemExit) as stopped:
        wandb_report.main(["--project", "proj"])
    assert stopped.value.code == 1
    assert said in capsys.readouterr().err


def test_a_report_is_saved_where_there_is_a_login(tmp_path: Path, server: FakeWandb) -> None:
    asked = ["--project", "proj", "--group", "tonight"]
    done = python(tmp_path, "-m", "lightning_compress.app.wandb_report", *asked, **online(server))
    assert done.returncode == 0, done.stderr
    [report] = server.reports
    assert (report["entityName"], report["projectName"]) == (ENTITY, "proj")
    assert report["displayName"] == "Compression: sweep tonight"
    assert ("group", "=", "tonight") in filters(json.loads(report["spec"]))
    assert f"/{ENTITY}/proj/reports/" in done.stdout
