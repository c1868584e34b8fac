"""What tests do in a page, and how they look at it."""

from __future__ import annotations

import time
from typing import Any

FILTERED = "document.getElementById('count').textContent.includes(' of ')"
TRACE = "(name) => document.getElementById('scatter').data.find((trace) => trace.name === name)"


def count(page: Any) -> str:
    found: str = page.inner_text("#count")
    return found


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("#table tbody .link").all_inner_texts()
    return found


def column(page: Any, number: int) -> list[str]:
    found: list[str] = page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()
    return found


def drag(page: Any, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over an element, from and to fractions of its width and height."""
    page.locator(selector).first.scroll_into_view_if_needed()
    box = page.locator(selector).first.bounding_box()
    (x0, y0), (x1, y1) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
    page.mouse.move(x0, y0)
    page.mouse.down()
    for step in range(1, 6):
        page.mouse.move(x0 + (x1 - x0) * step / 5, y0 + (y1 - y0) * step / 5)
    page.mouse.up()


def until(page: Any, condition: str, seconds: float = 20) -> None:
    """Wait for an expression to be true; Playwright's own way compiles it in the page, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.05)
