"""The command line itself: sweeps, their table, and what a mistake gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lightning_compress.app.jobs import write_json
from lightning_compress.app.table import SweepJob, sweep_table
from lightning_compress.footprint import Footprint
from lightning_compress.results import Results

SMALL = ["arch=lenet5", "arch.width=0.3", "trainer=debug", "logger=none", "dense.max_epochs=1", "report.latency=false"]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("lightning_compress.app.train", folder, *arguments)


def run_module(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def shown(jobs: list[SweepJob]) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(sweep_table(jobs))
    return console.export_text()


def test_a_sweep_ends_with_a_table_also_when_a_job_fails_and_skips_when_repeated(tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, "method.budget.macs=0.5,0.0001,1.5"]
    done = command(tmp_path, *arguments)
    assert done.returncode == 1
    assert "the lowest reachable" in done.stderr
    assert "Traceback" not in done.stderr
    _, _, table = done.stdout.partition("dense → now")
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == [f"method.budget.macs={b}" for b in ("0.5", "0.0001", "1.5")]
    assert ["failed" in row for row in rows] == [False, True, True]
    assert "method.budget.macs=1.5: method.budget: Budget(macs=...) must be a fraction in (0, 1]" in table
    outputs = tmp_path / "outputs"
    assert table.rstrip().endswith(f"Results: {outputs}\nDashboard: {outputs / 'dashboard.html'}")
    assert (outputs / "dashboard.html").is_file()
    assert "sweep: 1 of 3 done, 2 failed" in done.stderr
    jobs = [json.loads(file.read_text()) for file in outputs.glob("*/job.json")]
    assert sorted(job["status"] for job in jobs) == ["failed", "failed", "finished"]
    assert any("the lowest reachable" in (job["error"] or "") for job in jobs)
    assert not list((tmp_path / "outputs").glob(".sweep-*"))

    single = command(tmp_path, *SMALL, "method.budget.macs=0.5")  # the same job, alone
    assert single.returncode == 0
    assert "finished before" in single.stdout


def test_combinations_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    swept = ["method=weight_sharing,channel_pruning", "method.budget.macs=0.7,0.5"]
    done = command(tmp_path, "-m", *SMALL, "pictures=null", *swept)
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 of 2 done" in done.stderr
    _, _, table = done.stdout.partition("dense → now")
    assert table.count("left out") == 2
    assert "method=weight_sharing, method.budget.macs=0.7: Could not override 'method.budget.macs'." in table

    mistyped = command(tmp_path, "-m", *SMALL, "method=low_rank,channel_pruning", "method.bugdet.macs=0.5")
    assert mistyped.returncode == 1
    assert "Could not override 'method.bugdet.macs'" in mistyped.stderr
    assert "Traceback" not in mistyped.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["arch=resnet200"], ["Could not find 'arch/resnet200'", "resnet20", "vgg_small"]),
        (
            ["method.criterion=l7"],
            ["method: `criterion` must be one of l1, l2, fpgm, bn_scale, taylor,", "random, got 'l7'"],
        ),
        (["data=image_folder"], ["Missing mandatory value", "full_key: data.root"]),
        (
            ["method=none", "objective=val/accuracy"],
            ["`objective` must be one of val/loss, val/acc, test/loss, test/acc"],
        ),
    ],
    ids=["arch", "criterion", "root", "objective"],
)
def test_a_mistake_gets_one_clear_message(tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    done = command(tmp_path, *SMALL, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(words in done.stderr for words in said)


def test_help_names_the_groups(tmp_path: Path) -> None:
    done = command(tmp_path, "--help")
    assert done.returncode == 0
    assert "arch: alexnet, conv_autoencoder, conv_dbn, deconvolutional" in done.stdout
    assert "method: channel_pruning, channel_pruning_group_norm" in done.stdout


def test_the_table_shows_both_sides_and_what_differs(tmp_path: Path) -> None:
    dense = Footprint(params=272_000, nonzero=272_000, macs=2_530_000, bytes=1_110_000, peak_memory=1)
    small = Footprint(params=72_000, nonzero=72_000, macs=631_000, bytes=349_000, peak_memory=1)
    metrics = {"dense": {"test/acc": 0.75}, "final": {"test/acc": 0.5}}
    for name, compressed in (("a", None), ("b", small)):
        (tmp_path / name).mkdir()
        own = Results(dense, compressed)
        results = {**own.to_json(), "metrics": metrics, "figures": own.figures()}
        write_json(tmp_path / name / "results.json", results)
    text = shown(
        [
            SweepJob("arch=x,seed=1", tmp_path / "a", None),
            SweepJob("arch=y,seed=1", tmp_path / "b", None),
            SweepJob("arch=z,seed=1", tmp_path / "c", "no such [thing]"),
        ]
    )
    assert "seed=1" not in text
    one, other, failed = (line for line in text.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in one.split("│")][1:6] == ["arch=x", "0.7500 → 0.5000", "272k", "2.53M", "1.11M"]
    assert "272k → 72k" in other
    assert "2.53M → 631k" in other
    assert "failed" in failed
    assert "arch=z: no such [thing]" in text


def test_a_sweep_without_jobs_has_an_empty_table() -> None:
    assert "test/acc" in shown([])


def test_networks_of_other_libraries_are_options_beside_our_own(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("arch")]
    done = command(tmp_path, "-m", "arch=timm/test_resnet,timm/resnet81,lenet5", *small, "method=weight_sharing")
    assert done.returncode == 1
    _, _, table = done.stdout.partition("dense → now")
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["arch=timm/test_resnet", "arch=timm/resnet81", "arch=lenet5"]
    assert ["failed" in row for row in rows] == [False, True, False]
    assert "timm has no classification network named 'resnet81'; did you mean" in table
    folders = [path.parent.relative_to(tmp_path / "outputs") for path in tmp_path.rglob("compressed.safetensors")]
    assert len(folders) == 2
    assert all(len(folder.parts) == 1 for folder in folders)
