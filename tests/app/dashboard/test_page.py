from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from lightning_compress.app.dashboard import DashboardError, page, write_dashboard
from lightning_compress.app.dashboard.command import main
from tests.app.dashboard import folders


def scripts(text: str) -> dict[str, folders.Json]:
    """The data in a page, by id, as a browser reads it: a script ends at the first end tag, whatever is around it."""
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script', text, re.DOTALL)
    return {name: json.loads(content) for name, content in found}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "run", "results.json", folders.results("lenet5", "low_rank", 0.5))


def test_the_page_holds_all_runs(page_file: Path) -> None:
    data = scripts(page_file.read_text("utf-8"))

    assert len(data["summary"]["runs"]) == 20
    assert len(data["summary"]["others"]) == 4
    assert len([name for name in data if name.startswith("run-")]) == 20


def test_names_cannot_leave_their_script(one: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{plotly}} \u2028 \ud800"
    found = folders.results("lenet5", "low_rank", 0.5)
    found["config"] = {evil: evil}
    found["job"] |= {"name": evil, "command": evil}
    found["job"]["choices"] |= {"arch": evil, "method": evil}
    folders.write(one, "results.json", found)
    text = write_dashboard(tmp_path).read_text("utf-8")

    assert "alert(1)</script>" not in text
    [run] = scripts(text)["summary"]["runs"]
    assert run["arch"] == evil.replace("\ud800", "?")


def test_not_a_number_is_data_too(one: Path, tmp_path: Path) -> None:
    found = folders.results("lenet5", "low_rank", 0.5)
    found["environment"] = {"load": float("nan")}
    folders.write(one, "results.json", found)

    assert scripts(write_dashboard(tmp_path).read_text("utf-8"))["run-0"]["environment"] == {"load": "nan"}


def test_pictures_are_in_the_page_unless_they_are_too_many(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.complete(one)

    def source() -> str:
        output = tmp_path / "elsewhere" / "page.html"
        output.parent.mkdir(exist_ok=True)
        return scripts(write_dashboard(tmp_path, output).read_text("utf-8"))["run-0"]["pictures"][0]["source"]

    assert source().startswith("data:image/png;base64,")
    monkeypatch.setattr(page, "EMBEDDED", 10)
    assert source() == "../run/pictures/filters.png"


def test_the_artifact_is_linked(one: Path, tmp_path: Path) -> None:
    folders.complete(one)
    one.rename(tmp_path / "arch=lenet5,a b")
    run = scripts(write_dashboard(tmp_path).read_text("utf-8"))["run-0"]

    assert run["artifact"] == "arch=lenet5,a b/compressed.safetensors"
    assert run["link"] == "arch%3Dlenet5%2Ca%20b/compressed.safetensors"


def test_the_command_prints_the_path(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path)])

    assert capsys.readouterr().out == f"{tmp_path / 'dashboard.html'}\n"
    assert (tmp_path / "dashboard.html").is_file()


def test_a_damaged_artifact_is_a_note(one: Path, tmp_path: Path) -> None:
    folders.complete(one)
    (one / "compressed.safetensors").write_bytes(b"half")

    assert "compressed.safetensors" in scripts(write_dashboard(tmp_path).read_text("utf-8"))["run-0"]["note"]


def test_without_plotly_the_extra_is_named(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)

    with pytest.raises(DashboardError, match=r"lightning-compress\[dashboard\]"):
        write_dashboard(one)


def test_what_goes_wrong_says_the_way_out(tmp_path: Path, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DashboardError, match=r"no runs below .*results\.json"):
        write_dashboard(empty)
    with pytest.raises(DashboardError, match="there is no such folder"):
        write_dashboard(tmp_path / "nothing")
    with pytest.raises(DashboardError, match=r"cannot be written.*its folder does not exist"):
        write_dashboard(one, tmp_path / "nothing" / "page.html")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nothing")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("lightning-compress-dashboard: expected a folder with runs")
