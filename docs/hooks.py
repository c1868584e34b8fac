"""What the documentation's build does beside Markdown: formulas without a script, and pages that lie elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

# Files elsewhere that are pages here; links between them are written for the repository.
_PAGES = {
    "../benchmarks/README.md": "benchmarks.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "docs/": "",
    "../docs/": "",
}
_LINK = re.compile(rf"\]\(({'|'.join(map(re.escape, _PAGES))})")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Bring in the file that a page's `source` names, and let links between files be links between pages."""
    if "source" in page.meta:
        markdown = (Path(config.config_file_path).parent / page.meta["source"]).read_text(encoding="utf-8")
    return _LINK.sub(lambda link: f"]({_PAGES[link[1]]}", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of the formulas: browsers draw it by themselves."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    if "\\" in formula:
        raise ValueError(f"latex2mathml does not know all of {found[2]!r}: {formula}")
    return f'<div class="formula">{formula}</div>' if block else formula
