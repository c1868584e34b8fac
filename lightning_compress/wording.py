"""What errors say besides what is wrong: the names that were perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["NOT_FINITE", "did_you_mean", "near_names", "require_choice"]

NOT_FINITE = (
    "calibration data gives values that are not finite: is there a NaN or infinity in the inputs or the weights?"
)


def did_you_mean(value: object, names: Iterable[object]) -> str:
    """The end of a message about an unknown name: what was perhaps meant; empty if nothing is near.

    Args:
        value: what came.
        names: what there is.

    Example:
        >>> did_you_mean("tuker", ["spatial", "channel", "tucker"])
        "; did you mean 'tucker'?"
        >>> did_you_mean("svd", ["spatial", "channel", "tucker"])
        ''
    """
    given = str(value)
    alike = {str(name): difflib.SequenceMatcher(None, given, str(name)).ratio() for name in names}
    least = max(0.6, max(alike.values(), default=0.0) - 0.08)  # a name that is much less alike was not meant
    near = sorted((name for name in alike if alike[name] >= least), key=lambda name: -alike[name])[:3]
    if not near:
        return ""
    *others, last = map(repr, near)
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def near_names(value: str, names: Sequence[str], count: int = 5) -> str:
    """The names of a list that are nearest to one that is not in it, or else its first ones.

    Args:
        value: what came.
        names: what there is.
        count: how many to name at most.

    Example:
        >>> near_names("conv_1", ["conv1", "conv2", "fc"])
        'conv1, conv2'
    """
    near = difflib.get_close_matches(value, names, n=count, cutoff=0.4) or [name for name in names if name][:count]
    return ", ".join(near)


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise unless a setting is one of its choices.

    Args:
        name: of the setting.
        value: that was given.
        choices: what there is.

    Raises:
        ValueError: it is none of them; the message names them all, and the nearest.

    Example:
        >>> require_choice("allocation", "gredy", ["greedy", "uniform"])
        Traceback (most recent call last):
        ValueError: `allocation` must be one of greedy, uniform, got 'gredy'; did you mean 'greedy'?
    """
    known = list(choices)
    if isinstance(value, bool) or value not in known:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(str, known))}, got {value!r}{did_you_mean(value, known)}"
        )
