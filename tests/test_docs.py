"""The documentation says what is so: its blocks run, its messages exist, its pages are whole and ask no network."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

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
    for line, code in blocks(page):
        if any(word in code and importlib.util.find_spec(package) is None for word, package in OPTIONAL.items()):
            continue
        exec(compile("\n" * line + code, name(page), "exec"), variables)


def test_no_page_of_a_method_is_without_a_block_that_runs() -> None:
    pages = [page for page in PAGES if page.parent.name in ("methods", "howto") and page.stem != "index"]
    assert len(pages) > 10
    assert [name(page) for page in pages if not blocks(page)] == []
