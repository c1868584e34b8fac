"""The wheel, installed where nothing of the repository can be seen: what a stranger gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.test_notebooks import script

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "lightning-compress",
    "lightning-compress-dashboard",
    "lightning-compress-sensitivity",
    "lightning-compress-wandb-report",
)
SOURCES = ("lightning_compress", "hydra_plugins", "conf", "pyproject.toml", "README.md", "LICENSE")
SHORT = ("arch=lenet5", "arch.width=0.3", "trainer=debug", "dense.max_epochs=1", "trainer.max_epochs=2")


class Clean:
    """A virtual environment that holds the wheel, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.wheel = folder, wheel

    def run(self, command: str, *arguments: str, cwd: Path) -> str:
        """What a command of the environment prints; it must succeed."""
        hidden = ("PYTHON", "VIRTUAL_ENV", "WANDB", "LIGHTNING_COMPRESS", "PYTEST")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        done = subprocess.run(
            [str(self.folder / "bin" / command), *arguments],
            cwd=cwd,
            env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def built(folder: Path) -> Path:
    """The wheel, built from a copy, so that nothing that lies about in the repository gets into it."""
    copy = folder / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(folder), str(copy)], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["dependencies", pytest.param("index", marks=pytest.mark.slow)])
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Clean:
    """Made once, whoever asks first.

    `dependencies`: those of this environment are found by a path, which does not run what makes the repository
    importable here. `index`: all of them installed anew.
    """
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary if worker_id == "master" else temporary.parent) / f"wheel-{request.param}"
    with FileLock(f"{folder}.lock"):
        done = Clean(folder / "environment", next(iter(folder.glob("*.whl")), folder))
        if not (folder / "ready").is_file():
            folder.mkdir()
            done = Clean(folder / "environment", built(folder))
            venv.create(done.folder, with_pip=True, symlinks=True)
            if request.param == "index":
                constraints = str(ROOT / "constraints.txt")
                packages = [f"{done.wheel}[export,dashboard]", "jsonargparse[signatures]"]  # that is LightningCLI's
                done.run("pip", "install", "-qq", "-c", constraints, *packages, cwd=folder)
            else:
                done.run("pip", "install", "-qq", "--no-deps", "--no-index", str(done.wheel), cwd=folder)
                [site] = done.folder.glob("lib/python*/site-packages")
                (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            (folder / "ready").touch()
    return done


def test_it_holds_all_of_the_package_and_nothing_else(clean: Clean) -> None:
    inside = {name for name in zipfile.ZipFile(clean.wheel).namelist() if ".dist-info/" not in name}
    sources = {file for folder in SOURCES[:3] for file in (ROOT / folder).rglob("*") if file.is_file()}
    names = {file.relative_to(ROOT).as_posix() for file in sources if "__pycache__" not in file.parts}
    assert inside == {f"lightning_compress/{name}" if name.startswith("conf/") else name for name in names}


def test_it_is_the_wheel_that_is_imported(clean: Clean, tmp_path: Path) -> None:
    code = (
        "import lightning_compress, lightning_compress.conf as conf; print(lightning_compress.__file__, *conf.__path__)"
    )
    for place in clean.run("python", "-c", code, cwd=tmp_path).split():
        assert Path(place).is_relative_to(clean.folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(clean: Clean, command: str, tmp_path: Path) -> None:
    text = clean.run(command, "--help", cwd=tmp_path)
    assert command in text, "an example of how it is typed"
    assert not list(tmp_path.iterdir())


def test_a_sweep_in_an_empty_folder(clean: Clean, tmp_path: Path) -> None:
    text = clean.run("lightning-compress", "-m", *SHORT, "method.budget.macs=0.5,0.25", cwd=tmp_path)
    assert "Dashboard: " in text
    assert len(list(tmp_path.glob("outputs/*/compressed.safetensors"))) == 2
    assert len(list(tmp_path.glob("outputs/cache/*.ckpt"))) == 1
    assert (tmp_path / "outputs" / "dashboard.html").is_file()


def test_in_the_layout_of_lightning_hydra_template(clean: Clean, tmp_path: Path) -> None:
    """`hydra.searchpath` makes our groups those of another project."""
    shutil.copytree(ROOT / "examples" / "hydra_template", tmp_path, dirs_exist_ok=True)
    options = ["callbacks=compress", "method@callbacks.method=low_rank", "callbacks.method.budget.macs=0.7"]
    text = clean.run("python", "src/train.py", *options, "trainer.max_epochs=2", cwd=tmp_path)
    assert "test/acc" in text
    assert len(list(tmp_path.glob("logs/runs/*/compressed.safetensors"))) == 1


def test_with_lightning_cli(clean: Clean, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "lightning_cli", tmp_path, dirs_exist_ok=True)
    options = ["-c", "config.yaml", "-c", "compress.yaml", "--trainer.max_epochs=3"]
    text = clean.run("python", "main.py", "fit", *options, cwd=tmp_path)
    assert "In ONNX Runtime: int8 3 of 3" in " ".join(text.split())
    assert (tmp_path / "compressed.safetensors").is_file()


def test_the_first_notebook_runs_as_a_script(clean: Clean, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(script("01_add_to_your_run"))
    text = clean.run("python", "script.py", cwd=tmp_path)
    assert "the same digit on all 360 images" in text
