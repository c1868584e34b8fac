"""Reading files that others wrote: whole or half-written, of this version or another, and never with a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["DamagedFileError", "items", "number", "read_json", "section", "text", "without_nan"]


class DamagedFileError(ValueError):
    """A file that holds something else than it should."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DamagedFileError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DamagedFileError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DamagedFileError(f"{path.name}: expected an object, got {_kind(data)}")
    return data


def section(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; empty if there is none.

    Raises:
        DamagedFileError: there is something else.

    Example:
        >>> section({"dense": {"macs": 3}, "compressed": None}, "dense"), section({}, "job")
        ({'macs': 3}, {})
    """
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DamagedFileError(f"`{key}`: expected an object, got {_kind(value)}")
    return value


def items(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of the list under a key; empty if there is none.

    Raises:
        DamagedFileError: there is something else.
    """
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DamagedFileError(f"`{key}`: expected a list of objects, got {_kind(value)}")
    return value


def number(value: object) -> float | None:
    """A number that can be drawn; None for anything else, not-a-number and infinity included.

    Example:
        >>> number(2), number(float("nan")), number("2"), number(True)
        (2, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def text(value: object) -> str:
    """A string; empty for anything else."""
    return value if isinstance(value, str) else ""


def without_nan(value: Any) -> Any:
    """The same data with `nan` and `inf` as words: Python writes them into JSON, browsers do not read them.

    Example:
        >>> without_nan({"loss": [1.0, float("nan")]})
        {'loss': [1.0, 'nan']}
    """
    if isinstance(value, dict):
        return {str(name): without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
