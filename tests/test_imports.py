"""What an import costs, which names there are, and that the package ships whole."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_compress

ROOT = Path(__file__).parents[1]
HEAVY = ("torchvision", "timm", "onnx", "plotly", "wandb", "hydra", "lightning", "sklearn")


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are there after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_compress",
        "from lightning_compress import load_compressed, save_compressed",
        "from lightning_compress import Budget, prune_channels, measure, history",
    ],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement).isdisjoint(HEAVY)


def test_callbacks_load_lightning_only_when_asked_for() -> None:
    modules = loaded_by("from lightning_compress import ChannelPruning, CompressionReport")
    assert "lightning" in modules
    assert modules.isdisjoint({"timm", "onnx", "plotly", "wandb", "hydra"})


@pytest.mark.parametrize("name", lightning_compress.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(lightning_compress, name).__name__ == name
    assert name in dir(lightning_compress)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Budgie'"):
        _ = lightning_compress.Budgie


def test_every_package_ships() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(init.parent.relative_to(ROOT).parts) for init in ROOT.glob("lightning_compress/**/__init__.py")}
    plugins = {f"hydra_plugins.{init.parent.name}" for init in ROOT.glob("hydra_plugins/*/__init__.py")}
    assert set(packages) == there | plugins | {"lightning_compress.conf"}
    assert not [file for file in ROOT.glob("lightning_compress/*/*.py") if not (file.parent / "__init__.py").is_file()]
