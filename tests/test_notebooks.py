"""The notebooks as files. That they run from top to bottom is for `make notebooks`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    "01_add_to_your_run",
    "02_which_method",
    "03_deep_compression",
    "04_sweep_and_dashboard",
    "05_write_your_own_method",
)

every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> NotebookNode:
    """A notebook, as its file has it: nothing is converted or mended."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def script(name: str) -> str:
    """The code cells of a notebook, one after another, as a script.

    Args:
        name: of the notebook, without its suffix.
    """
    return "\n\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code") + "\n"


def prose(name: str) -> str:
    """The text cells of a notebook."""
    return "\n\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")


def test_these_are_all_there_are() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)
    assert {path.suffix for path in FOLDER.iterdir() if not path.name.startswith(".")} == {".ipynb"}


@every_notebook
def test_it_is_valid(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"  # the one that every environment with ipykernel has


@every_notebook
def test_it_holds_nothing_of_a_run(name: str) -> None:
    for cell in read(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        assert not cell.metadata


@every_notebook
def test_it_knows_no_machine(name: str) -> None:
    """No place outside of its temporary folder, no user, and no version of who edited it last."""
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert re.findall(r"/(?:home|Users|root|work|tmp|var|mnt|opt)/\S*|[A-Z]:\\\\\S*", text) == []
    assert set(read(name).metadata.language_info) == {"name"}
    assert "tempfile.TemporaryDirectory()" in script(name)


@every_notebook
def test_its_code_is_python(name: str) -> None:
    """No magics and no shell lines: what is copied from it runs anywhere."""
    for cell in read(name).cells:
        if cell.cell_type == "code":
            assert ast.parse(cell.source, filename=name).body


@every_notebook
def test_it_says_what_is_seen_and_how_long_it_takes(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {int(name[:2])} · ")
    assert "**What you will see:**" in first.source
    assert re.search(r"\*\*How long it takes:\*\* [^.]*(second|minute)s? on one CPU core", first.source)
    assert "pip install" in first.source


@every_notebook
def test_it_checks_what_it_claims(name: str) -> None:
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(script(name))))


@every_notebook
def test_its_links_lead_somewhere(name: str) -> None:
    text = prose(name)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("https://"):
            assert (FOLDER / target).is_file(), target
    for other in re.findall(r"`(\d\d_\w+\.ipynb)`", text):
        assert (FOLDER / other).is_file(), other


def test_the_first_needs_no_plotting() -> None:
    """Plotly is named under `try` only: the script of the first notebook runs without the extra `dashboard`."""
    tree = ast.parse(script(NAMES[0]))
    guarded = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Try) for part in ast.walk(node)}
    plain = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded
        for alias in node.names
    ]
    assert plain
    assert not any(name.split(".")[0] in ("plotly", "IPython") for name in plain)
