"""The README's picture of the dashboard: `python -m tests.app.dashboard.screenshot FOLDER FILE`.

FOLDER is what `lightning-compress-dashboard` takes. It has 256 colours, to be a small file.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from lightning_compress.app.dashboard import write_dashboard


def screenshot(folder: Path, output: Path, height: int = 1000) -> None:
    """Draw the upper part of the page of a folder."""
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page_file = write_dashboard(folder, Path(place) / "dashboard.html")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": height}, offline=True)
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("#scatter .main-svg")
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    # this method keeps the colours of small marks as they are
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
