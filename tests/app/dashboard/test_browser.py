"""What one does in the page, done in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.app.dashboard import page as page_module
from lightning_compress.app.dashboard import write_dashboard
from tests.app.dashboard import folders
from tests.app.dashboard.acting import FILTERED, TRACE, column, count, drag, names, until

Open = Callable[..., Any]


def test_it_shows_the_sweep(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)

    assert re.fullmatch(r"20 runs, \d+ on the front", count(page))
    assert page.inner_text("#totals").split("\n") == ["20 finished", "2 failed", "1 not finished", "1 unreadable"]
    assert len(names(page)) == 20
    assert len(page.evaluate(TRACE, "runs")["x"]) == 20
    assert page.evaluate(TRACE, "dense")["text"] == ["lenet5 dense", "vgg_small dense"]


def test_the_front_is_what_no_other_run_beats(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    runs = json.loads(page.inner_text("#summary") or page.evaluate("document.getElementById('summary').textContent"))[
        "runs"
    ]
    points = [(run["final"]["macs"], run["final"]["test/acc"]) for run in runs if run["compressed"]]
    best = {(x, y) for x, y in points if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)}
    front = page.evaluate(TRACE, "front")

    assert set(zip(front["x"], front["y"], strict=True)) == best
    assert page.locator("#table .badge").count() == len(best)


def test_axes_can_be_chosen_and_are_kept_in_the_address(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.select_option("#axis-x", "latency_b32")
    page.check("#log-x")
    page.check("#relative")

    assert (
        page.evaluate("document.getElementById('scatter').layout.xaxis.title.text") == "latency, batch 32, % of dense"
    )
    assert page.evaluate("document.getElementById('scatter').layout.xaxis.type") == "log"
    assert page.evaluate(TRACE, "dense")["x"] == [100, 100]
    again = open_page(page_file, page.url[page.url.index("#") :])
    assert again.input_value("#axis-x") == "latency_b32"
    assert again.is_checked("#relative")
    assert again.evaluate(TRACE, "front") == page.evaluate(TRACE, "front")


def test_filters_by_text_method_and_range(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.fill("#search", "vgg low")
    assert count(page).startswith("3 of 20 runs")
    page.get_by_label("MACs per sample, highest").fill("1300000")
    page.get_by_label("MACs per sample, highest").press("Enter")
    assert names(page) == ["vgg_small, low_rank, budget.macs=0.25", "vgg_small, low_rank, budget.macs=0.5"]
    assert len(page.evaluate(TRACE, "runs")["x"]) == 2
    page.get_by_role("button", name="remove filter: “vgg low”").click()
    page.get_by_role("checkbox", name="low_rank 6").uncheck()
    assert not any("low_rank" in name for name in names(page))
    page.get_by_role("button", name="remove filter: clear all").click()
    assert count(page).startswith("20 runs")
    assert page.input_value("[aria-label='MACs per sample, highest']") == ""
    page.fill("#search", "nothing of the kind")
    assert page.inner_text("#table tbody") == "No run passes the filters."


def test_one_click_leaves_one_method(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.get_by_role("button", name="only weight_sharing").click()

    assert set(column(page, 3)) == {"weight_sharing"}


def test_runs_that_came_to_nothing_are_out_of_sight_until_asked_for(open_page: Open, tmp_path: Path) -> None:
    folders.sweep(tmp_path)
    lost = folders.results("lenet5", "low_rank", 0.1)
    lost["metrics"]["final"]["test/acc"] = 0.1
    folders.write(tmp_path / "lost", "results.json", lost)
    page = open_page(write_dashboard(tmp_path))
    low = "document.getElementById('scatter')._fullLayout.yaxis.range[0]"

    assert page.evaluate(low) > 0.5
    page.get_by_role("button", name="Show 1 far off").click()
    assert page.evaluate(low) < 0.1
    assert page.locator("#parallel g[data-key='test/acc'] text").nth(2).text_content().startswith("≤ ")


def test_columns_sort(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    header = page.locator("#table th", has_text="MACs").first

    def macs() -> list[float]:
        sizes = {"k": 1e3, "M": 1e6}
        cells = [cell.split("\u202f") for cell in column(page, 7)]
        return [float(number) * sizes[unit] for number, unit in cells]

    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert macs() == sorted(macs())
    page.keyboard.press("Enter")  # the button keeps the focus
    assert header.get_attribute("aria-sort") == "descending"
    assert macs() == sorted(macs(), reverse=True)


def test_a_box_in_the_scatter_filters_all_views(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    drag(page, "#scatter .nsewdrag", (0.03, 0.05), (0.5, 0.95))
    until(page, FILTERED)
    kept = len(names(page))

    assert 0 < kept < 20
    assert len(page.evaluate(TRACE, "runs")["x"]) == kept
    assert len(page.evaluate(TRACE, "faded")["x"]) == 20 - kept
    high = float(page.input_value("[aria-label='MACs per sample, highest']"))
    assert max(page.evaluate(TRACE, "runs")["x"]) <= high < min(page.evaluate(TRACE, "faded")["x"])
    assert page.locator("#parallel .brush").count() == 2


def test_a_box_means_the_same_on_logarithmic_axes(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file, "#lx=1")
    drag(page, "#scatter .nsewdrag", (0.03, 0.05), (0.5, 0.95))
    until(page, FILTERED)
    high = float(page.input_value("[aria-label='MACs per sample, highest']"))

    assert max(page.evaluate(TRACE, "runs")["x"]) <= high < min(page.evaluate(TRACE, "faded")["x"])


def test_the_lasso_filters(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.get_by_role("button", name="Lasso").click()
    box = page.locator("#scatter .nsewdrag").bounding_box()
    corners = [(0, 0), (0.5, 0), (0.5, 1), (0, 1), (0, 0.02)]
    places = [(box["x"] + 2 + x * (box["width"] - 4), box["y"] + 2 + y * (box["height"] - 4)) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()
    until(page, FILTERED)

    assert 0 < len(names(page)) < 20
    assert "in the lasso" in page.inner_text("#chips")
    assert len(page.evaluate(TRACE, "runs")["x"]) == len(names(page))


def test_parallel_coordinates_filter_all_views(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    grip = "#parallel g[data-key='params'] .grip"
    drag(page, grip, (0.5, 0.55), (0.5, 1.0))
    kept = names(page)

    assert 0 < len(kept) < 20
    assert len(page.evaluate(TRACE, "runs")["x"]) == len(kept)
    assert float(page.input_value("[aria-label='parameters, highest']")) > 0
    page.locator(grip).click(position={"x": 5, "y": 20})
    assert len(names(page)) == 20


def test_pointing_shows_a_run_in_all_views(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    row = page.locator("#table tbody tr").nth(3)
    row.hover()
    page.wait_for_selector("#ring")
    assert "pointed" in row.get_attribute("class")
    page.locator("#scatter").scroll_into_view_if_needed()
    place = page.evaluate(
        """() => {
            const [chart, index] = [document.getElementById("scatter"), 0];
            const trace = chart.data.find(({ name }) => name === "runs");
            const { xaxis, yaxis } = chart._fullLayout;
            const box = chart.getBoundingClientRect();
            const at = (axis, value, start) => start + axis._offset + axis.d2p(value);
            return [at(xaxis, trace.x[index], box.left), at(yaxis, trace.y[index], box.top)];
        }"""
    )
    page.mouse.move(*place)
    page.wait_for_selector("#scatter .hovertext")
    assert "dense" in page.locator("#scatter .hovertext").text_content()
    page.mouse.click(*place)
    page.wait_for_selector("#details[open]")


def test_a_run_opens_with_all_that_is_known(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.get_by_role("button", name="lenet5, channel_pruning, budget.macs=0.5", exact=True).click()
    details = page.locator("#details")

    text = details.inner_text()
    assert "lightning-compress arch=lenet5 method=channel_pruning method.budget.macs=0.5" in text
    assert "kept 10 of 20 outputs" in text
    assert "it reaches the output: conv2.weight:0" in text
    assert "2× less" in text
    assert details.locator(".curve").count() == 2
    assert details.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 8
    details.get_by_text("Configuration").click()
    details.get_by_text("round_to: 8").wait_for()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    details.get_by_role("button", name="Copy").click()
    details.get_by_role("button", name="Copied").wait_for()
    page.keyboard.press("Escape")
    assert not details.is_visible()


def test_pictures_beside_the_page_are_shown(open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.complete(folders.write(tmp_path / "a=b,c d", "results.json", folders.results("lenet5", "low_rank", 0.5)))
    monkeypatch.setattr(page_module, "EMBEDDED", 10)
    page = open_page(write_dashboard(tmp_path))
    page.locator("#table .link").click()

    assert page.locator("#details img").get_attribute("src").startswith("a%3Db")
    assert page.locator("#details img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 8


def test_a_link_opens_the_run(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.locator("#table .link").nth(4).click()
    again = open_page(page_file, page.url[page.url.index("#") :])
    again.wait_for_selector("#details[open]")

    assert again.inner_text("#details-title") == page.inner_text("#details-title")


def test_two_runs_are_compared(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    compare = page.get_by_role("button", name="Compare", exact=True)
    assert compare.is_disabled()
    for name in ("lenet5, channel_pruning, budget.macs=0.5", "vgg_small, low_rank, budget.macs=0.25"):
        page.get_by_label(f"compare {name}").check()
    compare.click()

    text = page.inner_text("#comparison")
    assert "A\nlenet5, channel_pruning, budget.macs=0.5" in text
    assert re.search(r"MACs per sample\s+26[89].k\s+595.k\s+2.22× more\s+A", text)
    assert re.search(r"method.budget.macs\s+0.5\s+0.25", text)
    assert "round_to" not in text
    page.keyboard.press("Escape")
    page.get_by_label("compare vgg_small, low_rank, budget.macs=0.5").check()
    assert compare.is_disabled()


def test_failed_runs_say_what_to_do(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)

    assert "ValueError: <b>no</b> </script> layer" in page.text_content("#failed")
    assert "lightning-compress arch=alexnet0 seed=1" in page.text_content("#failed")
    assert "lightning-compress seed=3" in page.text_content("#unfinished")
    assert "results.json is not JSON" in page.text_content("#unreadable")


@pytest.mark.parametrize("status", ["failed", "running"])
def test_a_folder_in_which_nothing_has_finished(open_page: Open, tmp_path: Path, status: str) -> None:
    folders.write(tmp_path / "a", "job.json", {"status": status, "error": "no memory", "job": folders.job(["seed=1"])})
    page = open_page(write_dashboard(tmp_path))

    assert page.inner_text("#table tbody") == "No run has finished yet."
    assert "lightning-compress seed=1" in page.inner_text("#others")


def test_names_are_text_and_nothing_else(open_page: Open, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)></script><b>"
    found = folders.results("lenet5", "low_rank", 0.5)
    found["job"] |= {"name": evil, "choices": {"arch": evil, "method": evil, "data": evil}}
    found["budgets"] = [{**row, "unit": evil, "callback": evil} for row in found["budgets"]]
    found["layers"] = [{**row, "tensor": f"{evil}.weight"} for row in found["layers"]]
    found["frozen"] = {evil: evil}
    page = open_page(write_dashboard(folders.write(tmp_path, "results.json", found)))
    page.locator("#table .link").click()

    assert page.locator("img").count() == 0
    assert evil in page.inner_text("#details-title")


def test_a_report_without_a_metric_or_times(open_page: Open, tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    for name in ("metrics", "config", "config_digest", "job"):
        del found[name]
    found |= {"metric": None, "dense": {**found["dense"], "latency": {}}, "budgets": [], "frozen": {}}
    page = open_page(write_dashboard(folders.write(tmp_path, "results.json", found)))
    page.locator("#table .link").click()

    assert "The command was not recorded." in page.inner_text("#details")


def test_a_thousand_runs(open_page: Open, large_page_file: Path) -> None:
    page = open_page(large_page_file)
    assert count(page).startswith("1,000 runs")
    assert len(names(page)) == 100
    page.get_by_role("button", name="Show all 1,000").click()
    assert len(names(page)) == 1000
    page.fill("#search", "lenet5 rank")
    kept = len(names(page))
    assert 0 < kept < 500
    page.locator("#table th", has_text="MACs").first.get_by_role("button").click()
    drag(page, "#scatter .nsewdrag", (0.03, 0.05), (0.2, 0.95))
    until(page, f"document.querySelectorAll('#table tbody .link').length < {kept}")
    page.locator("#table .link").first.click()
    assert page.locator("#details .layers tbody tr").count() == 20
