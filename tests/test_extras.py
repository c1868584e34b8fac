"""Packages that not everyone has."""

from __future__ import annotations

import pytest

from lightning_compress import extras


@pytest.mark.parametrize(("absent", "said"), [("timm", r"lightning-compress\[vision\]"), ("yaml", "No module named")])
def test_what_is_absent_is_named_with_its_extra_and_what_is_broken_is_not_called_absent(
    monkeypatch: pytest.MonkeyPatch, absent: str, said: str
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{absent}'", name=absent)

    monkeypatch.setattr(extras.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match=said):
        extras.require_extra("timm.models", "vision")
