"""Packages that are not needed by everyone: they load where they are used, and are missed by name."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require_extra"]


def require_extra(module: str, extra: str) -> ModuleType:
    """Import a module that one of this package's extras installs.

    Args:
        module: dotted name.
        extra: the extra, as in `pip install "lightning-compress[EXTRA]"`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.

    Example:
        >>> require_extra("timm", "vision").__name__
        'timm'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # installed, but something that it needs is not
            raise
        raise ModuleNotFoundError(
            f'{package} is not installed; get it with: pip install "lightning-compress[{extra}]"', name=package
        ) from error
