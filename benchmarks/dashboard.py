"""How soon the dashboard of many runs is on the screen, and how fast it answers, in Chromium.

    python benchmarks/dashboard.py [--quick] [--runs N] [--json FILE]

A page of made-up runs is opened from the disk, each time by a browser without a cache. Times are in milliseconds from
the navigation on: the first paint (the table and the filters), the scatter drawn, the page loaded; then those of
single actions, until the next frame is painted. Chromium is the system's; Playwright is among the requirements of
development.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import command
from lightning_compress.app.dashboard import write_dashboard
from tests.app.dashboard.folders import many

ACCEPTED = 2000  # ms to the first paint

OBSERVER = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#scatter .points path")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.scatterDrawn = performance.now(); }));
}).observe(document, { childList: true, subtree: true });
"""
ACTIONS = {
    "filter by text": """() => {
        const search = document.getElementById("search");
        search.value = search.value ? "" : "lenet5";
        search.dispatchEvent(new Event("input"));
    }""",
    "sort": """() => document.querySelector("#table [data-sort=macs]").click()""",
    "choose an axis": """() => {
        const axis = document.getElementById("axis-x");
        axis.value = axis.value === "params" ? "macs" : "params";
        axis.dispatchEvent(new Event("change"));
    }""",
    "open a run": """() => {
        document.querySelector("dialog[open]")?.close();
        document.querySelector("#table .link").click();
    }""",
}
TIMED = """async (source) => {
    const start = performance.now();
    (0, eval)(`(${source})`)();
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    return performance.now() - start;
}"""


def load(browser: Browser, file: Path) -> dict[str, float]:
    """Open the page once and try each action."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True, bypass_csp=True)
    page = context.new_page()
    page.add_init_script(OBSERVER)
    page.goto(file.resolve().as_uri())
    while page.evaluate("window.scatterDrawn === undefined"):
        time.sleep(0.05)
    found: dict[str, float] = page.evaluate(
        """() => ({
            "first paint": performance.getEntriesByName("first-contentful-paint")[0].startTime,
            "scatter drawn": window.scatterDrawn,
            "page loaded": performance.getEntriesByType("navigation")[0].loadEventEnd,
        })"""
    )
    for name, action in ACTIONS.items():
        found[name] = statistics.median(page.evaluate(TIMED, action) for _ in range(4))
    context.close()
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="open the page three times instead of nine")
    parser.add_argument("--runs", type=int, default=1000, help="runs in the page; here: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = many(Path(place), options.runs)
        start = time.perf_counter()
        file = write_dashboard(folder)
        written, size = 1000 * (time.perf_counter() - start), file.stat().st_size
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        loads = [load(browser, file) for _ in range(3 if options.quick else 9)]
        browser.close()
    table = Table(title=f"{options.runs:,} runs, {size / 1e6:.1f} MB, written in {written / 1000:.1f} s")
    for column in ("", "median ms", "lowest", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for name in loads[0]:
        times = [one[name] for one in loads]
        table.add_row(name, *(f"{value:.0f}" for value in (statistics.median(times), min(times), max(times))))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    paint = statistics.median(one["first paint"] for one in loads)
    verdict = "passed" if paint < ACCEPTED else "MISSED"
    console.print(f"first paint {paint:.0f} ms, accepted {ACCEPTED} ms: {verdict}")
    if options.json:
        metrics = {"written": written, "bytes": size, **{name: [one[name] for one in loads] for name in loads[0]}}
        rows = [{"case": f"{options.runs} runs", "side": "ours", "metrics": metrics}]
        data = {"benchmark": "dashboard", "command": command(), "rows": rows}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
