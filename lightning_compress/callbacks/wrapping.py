"""Methods wrapped on an instance, and put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["Wrapping"]


class Wrapping:
    """Wraps methods of one object without touching its class; `undo` leaves it as it came.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> wrapping = Wrapping(greeter)
        >>> wrapping.wrap("greet", lambda greet: greet().upper())
        >>> greeter.greet()
        'HELLO'
        >>> wrapping.undo()
        >>> greeter.greet(), vars(greeter)
        ('hello', {})
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self._before: dict[str, Any] = {}

    def wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Let calls of a method go to `around(method, *args, **kwargs)`; its signature stays visible."""
        method = getattr(self.owner, name)
        self._before[name] = self.owner.__dict__.get(name)

        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs)

        self.owner.__dict__[name] = wrapped

    def undo(self) -> None:
        """Put back what was there."""
        for name, before in self._before.items():
            if before is None:
                self.owner.__dict__.pop(name, None)
            else:
                self.owner.__dict__[name] = before
        self._before = {}
