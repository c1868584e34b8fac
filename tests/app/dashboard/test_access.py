"""The page for those who use a keyboard, a screen reader, a phone or a dark screen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.app.dashboard.acting import until

Open = Callable[..., Any]


def violations(page: Any) -> list[str]:
    """What axe calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {[(node['html'][:200], node['failureSummary'][:300]) for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_axe(open_page: Open, page_file: Path, scheme: str, width: int) -> None:
    page = open_page(page_file, width=width, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#filters").evaluate("(filters) => { filters.open = true; }")
    page.fill("#search", "e")
    page.get_by_role("checkbox", name="low_rank 6").uncheck()
    assert violations(page) == []
    page.get_by_label("compare lenet5, channel_pruning, budget.macs=0.5").check()
    page.get_by_label("compare vgg_small, weight_sharing, budget.macs=0.5").check()
    assert violations(page) == []
    page.get_by_role("button", name="lenet5, channel_pruning, budget.macs=0.5", exact=True).click()
    page.locator("#details summary").first.click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert violations(page) == []


def test_with_the_keyboard_alone(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table of runs"
    page.keyboard.press("Enter")

    def tab_to(selector: str) -> None:
        for _ in range(200):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"no way to {selector!r} by tabulator")

    tab_to("#table tbody input")
    page.keyboard.press("Space")
    tab_to("#table tbody input")
    page.keyboard.press("Space")
    tab_to(".link")
    name = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    assert page.inner_text("#details-title") == name
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == name
    page.focus("#compare")
    page.keyboard.press("Enter")
    assert page.is_visible("#comparison")
    page.keyboard.press("Escape")
    page.focus("#search")
    page.keyboard.type("vgg")
    tab_to("input[data-facet='method']")
    page.keyboard.press("Space")
    chips = page.locator("#chips button").count()
    tab_to("#chips button")
    page.keyboard.press("Enter")
    assert page.locator("#chips button").count() < chips
    assert page.evaluate("document.activeElement.closest('#chips, #search') !== null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(open_page: Open, page_file: Path, scheme: str) -> None:
    page = open_page(page_file, width=375, height=740, color_scheme=scheme, has_touch=True, is_mobile=True)
    wide = "document.documentElement.scrollWidth"

    assert page.evaluate(wide) == 375
    page.tap("#filters summary")
    assert page.evaluate(wide) == 375
    page.locator("#table .link").nth(1).tap()
    assert page.evaluate("document.getElementById('details').scrollWidth") <= 375
    page.get_by_role("button", name="Close").tap()
    for number in (0, 1):
        page.locator("#table tbody input").nth(number).tap()
    page.tap("#compare")
    box = page.locator("#comparison").bounding_box()
    assert box["x"] >= 0
    assert box["width"] <= 375
    assert page.evaluate("document.getElementById('comparison').scrollWidth") <= 375


def test_charts_follow_the_colour_scheme(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file, color_scheme="light")
    colours = "() => [document.getElementById('scatter').layout.font.color, getComputedStyle(document.body).color]"
    before = page.evaluate(colours)
    page.emulate_media(color_scheme="dark")
    until(page, f"({colours})()[0] !== '{before[0]}'")
    after = page.evaluate(colours)

    assert before[1] == "rgb(27, 31, 36)"
    assert after[1] == "rgb(231, 234, 237)"
