"""`lightning-compress-dashboard`: the runs below a folder as one HTML page."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.app.dashboard.gather import gather
from lightning_compress.app.dashboard.page import make_page
from lightning_compress.files import write_atomic

__all__ = ["DashboardError", "main", "write_dashboard"]


_EXAMPLES = """examples:
  lightning-compress-dashboard outputs                      writes outputs/dashboard.html
  lightning-compress-dashboard outputs --open               and opens it
  lightning-compress-dashboard outputs --output page.html   under another name

A sweep writes the page itself, beside its jobs. A run of your own is shown too, by the results.json of its
CompressionReport."""


class DashboardError(ValueError):
    """A folder of which no page can be made, or a place where none can be written."""


def write_dashboard(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of all runs below a folder; it appears whole or not at all.

    The page is one file that holds everything it needs, and opens from the disk. Only where the pictures of its runs
    are more than it can carry does it refer to them, relative to where it lies.

    Args:
        folder: searched with all that is in it, but for hidden folders and `cache`: the `output_dir` of jobs and
            sweeps, or a folder with the `results.json` of a `CompressionReport`.
        output: the file to write, in a folder that exists; by default `dashboard.html` in `folder`.

    Returns:
        The file.

    Raises:
        DashboardError: there is no such folder, there are no runs in it, or the file cannot be written.

    Example:
        >>> import json, tempfile
        >>> footprint = {"macs": 9, "params": 3, "bytes": 12, "peak_memory": 20, "latency": {}}
        >>> results = {"format": 1, "dense": footprint, "compressed": {**footprint, "macs": 4}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "results.json").write_text(json.dumps(results))
        ...     write_dashboard(folder).name
        'dashboard.html'
    """
    root = Path(folder)
    if not root.is_dir():
        wrong = "it is a file" if root.exists() else "there is no such folder"
        raise DashboardError(f"expected a folder with runs, got {os.fspath(folder)!r}: {wrong}")
    target = root / "dashboard.html" if output is None else Path(output)
    runs = gather(root)
    if not runs:
        raise DashboardError(
            f"there are no runs below {os.fspath(folder)!r}: expected folders with a `results.json` or a `job.json`, "
            "as `lightning-compress` and `CompressionReport` write them; give the `output_dir` of a job or a sweep"
        )
    try:
        write_atomic(target, make_page(runs, root, target))
    except OSError as error:
        raise DashboardError(f"the page cannot be written: {error}") from error
    except ModuleNotFoundError as error:
        raise DashboardError(f'{error}; the dashboard needs: pip install "lightning-compress[dashboard]"') from error
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script.

    Args:
        arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-compress-dashboard",
        description="Write one HTML page of all runs below a folder, which opens without a server and a network.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the output_dir of jobs or sweeps; it is searched with all in it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: dashboard.html in the folder")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    options = parser.parse_args(arguments)
    try:
        page = write_dashboard(options.folder, options.output)
    except DashboardError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    sys.stdout.write(f"{page}\n")
    if options.open:
        webbrowser.open(page.resolve().as_uri())
