"""From runs to the page: one HTML file with its style, its scripts, Plotly and the data inlined."""

from __future__ import annotations

import base64
import datetime
import html
import json
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_compress import __version__
from lightning_compress.app.dashboard.gather import Run
from lightning_compress.app.dashboard.quantities import describe
from lightning_compress.app.dashboard.reading import without_nan

__all__ = ["make_page"]

SCRIPTS = (
    "elements",
    "format",
    "data",
    "filters",
    "parallel",
    "table",
    "others",
    "scatter",
    "curves",
    "details",
    "compare",
    "main",
)
"""In this order they are one script: later ones use what earlier ones define."""

EMBEDDED = 16_000_000
"""Characters of pictures that a page carries; where there are more, it refers to the files."""


def make_page(runs: Sequence[Run], folder: Path, target: Path) -> str:
    """The page as text.

    Args:
        runs: what `gather` found.
        folder: where; names are shown relative to it.
        target: the file that the page will be, for what it refers to.

    Raises:
        ModuleNotFoundError: Plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    finished = [run for run in runs if run.status == "finished"]
    size = sum(_encoded_size(picture) for run in finished for picture in run.details.pictures)
    embed = size <= EMBEDDED
    summary = {
        "quantities": describe(dict.fromkeys(key for run in finished for key in (*run.dense, *run.final))),
        "runs": [_summary(run, folder) for run in finished],
        "others": [_other(run, folder) for run in runs if run.status != "finished"],
    }
    details = (
        f'<script type="application/json" id="run-{index}">{_json(_details(run, folder, target, embed))}</script>'
        for index, run in enumerate(finished)
    )
    title = folder.resolve().name or "runs"
    now = datetime.datetime.now().astimezone()
    return _fill(
        _asset("page.html"),
        {
            "title": html.escape(title),
            "written": now.isoformat(timespec="seconds"),
            "written_short": now.strftime("%Y-%m-%d %H:%M"),
            "version": html.escape(__version__),
            "style": _asset("page.css"),
            "summary": _json(summary),
            "details": "\n".join(details),
            "plotly": get_plotlyjs(),
            "script": "\n".join(_asset(f"{name}.js") for name in SCRIPTS),
        },
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text("utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """In one pass: what is filled in is not searched for places to fill."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], template)


def _json(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it closes or opens one."""
    packed = json.dumps(without_nan(data), ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    # lone surrogates come from names of files that are no UTF-8, and from "\ud800" in JSON
    packed = packed.encode("utf-8", "replace").decode()
    return packed.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _summary(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "name": run.name,
        "label": run.label,
        "folder": _relative(run.folder, folder),
        "arch": run.arch,
        "method": run.method,
        "data": run.data,
        "compressed": run.compressed,
        "dense": {key: _short(value) for key, value in run.dense.items()},
        "final": {key: _short(value) for key, value in run.final.items()},
        "budgets": run.budgets,
        "seconds": run.seconds,
    }


def _other(run: Run, folder: Path) -> dict[str, Any]:
    shown = {"label": run.label, "status": run.status, "error": run.error, "command": run.command}
    return {**shown, "folder": _relative(run.folder, folder)}


def _details(run: Run, folder: Path, target: Path, embed: bool) -> dict[str, Any]:
    own = run.details
    return {
        "command": run.command,
        "layers": own.layers,
        "frozen": own.frozen,
        "edits": own.edits,
        "curves": own.curves,
        "pictures": [{"name": picture.stem, "source": _source(picture, target, embed)} for picture in own.pictures],
        "artifact": None if own.artifact is None else _relative(own.artifact, folder),
        "link": None if own.artifact is None else _link(own.artifact, target),
        "note": own.note,
        "config": own.config,
        "environment": own.environment,
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _encoded_size(picture: Path) -> int:
    try:
        return (picture.stat().st_size + 2) // 3 * 4
    except OSError:
        return 0


def _source(picture: Path, target: Path, embed: bool) -> str:
    try:
        content = picture.read_bytes() if embed else b""
    except OSError:  # gone since it was found
        content = b""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content else _link(picture, target)


def _link(path: Path, target: Path) -> str:
    """A reference from the page to a file; folders of jobs have `=` and `,` in their names."""
    try:
        return urllib.parse.quote(Path(os.path.relpath(path.resolve(), target.resolve().parent)).as_posix())
    except ValueError:  # another drive
        return path.resolve().as_uri()
