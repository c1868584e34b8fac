"""A browser without a network, and pages to open in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.app.dashboard import write_dashboard
from tests.app.dashboard import folders

# Not for the session: while Playwright is at work its thread has an event loop, which other tests may want themselves.
SCOPE = "package"


def _unavailable(reason: str) -> None:
    """Skip, but for continuous integration, which is to have a browser."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope=SCOPE)
def browser() -> Iterator[Any]:
    """Chromium as the system has it, driven by Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _unavailable('the dashboard is tested in a browser: pip install "lightning-compress[dev]"')
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        _unavailable("the dashboard is tested in a browser, and there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Open a file; at the end nothing may have gone wrong in it, and nothing been asked of any network."""
    wrong: list[str] = []
    contexts = []

    def opened(path: Path, link: str = "", width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "console", lambda said: wrong.append(f"console: {said.text}") if said.type in ("error", "warning") else None
        )
        page.on(
            "request", lambda sent: None if sent.url.startswith(("file:", "data:", "blob:")) else wrong.append(sent.url)
        )
        page.goto(path.resolve().as_uri() + link)
        page.wait_for_function(
            "document.querySelector('#scatter .main-svg') || document.querySelector('#layout[hidden]')"
        )
        return page

    yield opened
    folder = os.environ.get("LIGHTNING_COMPRESS_SCREENSHOTS")
    for number, context in enumerate(contexts):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            context.pages[0].screenshot(path=Path(folder) / f"{request.node.name}-{number}.png", full_page=True)
        context.close()
    assert wrong == []


@pytest.fixture(scope=SCOPE)
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep of 20 finished runs, and four others."""
    return write_dashboard(folders.sweep(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope=SCOPE)
def large_page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a thousand runs."""
    return write_dashboard(folders.many(tmp_path_factory.mktemp("many")))
