"""A machine on which an optional library is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


class Absent:
    """An import hook under which one library is not there."""

    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == self.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.library)


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a library absent until the end of the test."""

    def remove(library: str) -> None:
        for module in [name for name in sys.modules if name.partition(".")[0] == library]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Absent(library), *sys.meta_path])

    return remove
