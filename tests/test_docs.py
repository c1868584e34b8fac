"""The documentation says what is so: its blocks run, its messages exist, its pages are whole and ask no network."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import lightning_compress
from lightning_compress import distill
from lightning_compress.distill import losses
from lightning_compress.methods.criteria import CRITERIA
from tests import reader

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"OpenVinoNetwork": "openvino"}
"""Names of the package that need what the tests' environment may lack."""

_BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of the line that it begins after."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        code = "".join(line.removeprefix(block["indent"]) for line in block["code"].splitlines(keepends=True))
        found.append((text.count("\n", 0, block.start()) + 1, code))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")  # 64 images are few to calibrate on, and Lightning has advice
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_python_blocks_of_a_page_run_one_after_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    variables = reader.namespace(tmp_path)
    left_out = []
    for line, code in blocks(page):
        if any(word in code and importlib.util.find_spec(package) is None for word, package in OPTIONAL.items()):
            left_out.append(line)
            continue
        with mock.patch.dict(CRITERIA):  # one page adds to it
            exec(compile("\n" * line + code, name(page), "exec"), variables)
    if left_out:
        pytest.skip(f"all but the blocks at lines {left_out} ran: those need {', '.join(OPTIONAL.values())}")


def test_no_page_of_a_method_is_without_a_block_that_runs() -> None:
    pages = [page for page in PAGES if page.parent.name in ("methods", "howto") and page.stem != "index"]
    assert len(pages) > 10
    assert [name(page) for page in pages if not blocks(page)] == []


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    public = [
        f"{module.__name__}.{each}" for module in (lightning_compress, distill, losses) for each in module.__all__
    ]
    assert len(shown) == len(set(shown))
    assert [each for each in public if each not in shown] == []


def test_the_pages_are_built_without_a_broken_link_and_fetch_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    outside = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?https?://[^>]*>")
    assert {tag for page in pages for tag in outside.findall(page.read_text(encoding="utf-8"))} == set()
    formulas = (tmp_path / "methods" / "channel_pruning.html").read_text(encoding="utf-8")
    assert "<math" in formulas
    assert "arithmatex" not in formulas
    examples = (tmp_path / "reference" / "losses.html").read_text(encoding="utf-8")
    assert "Examples:" in examples
    assert "<blockquote>" not in examples  # what `>>>` would be outside of code


def test_every_message_in_the_troubleshooting_is_one_of_the_package() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^(`+)(.+)\1\n:   ", text, re.MULTILINE)
    known = list(messages())
    assert len(quoted) > 60
    assert len({message for _, message in quoted}) == len(quoted)
    assert [message for _, message in quoted if not any(message.strip() in one for one in known)] == []


def messages() -> set[str]:
    """All texts of the package's code but its docstrings, with … where values are filled in."""
    found = set()
    for path in (ROOT / "lightning_compress").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return found
