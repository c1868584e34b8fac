"""Schedules: pure functions from progress t in [0, 1] to the fraction of the final amount that is due by then."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["SCHEDULES", "Schedule", "cubic", "linear", "one_shot"]

Schedule = Callable[[float], float]


def one_shot(t: float) -> float:
    """Everything at once, as soon as the window opens.

    Args:
        t: progress in [0, 1].

    Returns:
        The fraction of the final amount that is due.

    Example:
        >>> one_shot(0.0)
        1.0
    """
    return 1.0


def linear(t: float) -> float:
    """The same amount at each step.

    Args:
        t: progress in [0, 1].

    Returns:
        The fraction of the final amount that is due.

    Example:
        >>> linear(0.25)
        0.25
    """
    return min(max(t, 0.0), 1.0)


def cubic(t: float) -> float:
    """Much early, little late: 1 - (1 - t)^3 (Zhu and Gupta 2017, arXiv 1710.01878).

    Args:
        t: progress in [0, 1].

    Returns:
        The fraction of the final amount that is due.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - min(max(t, 0.0), 1.0)) ** 3


SCHEDULES: Mapping[str, Schedule] = {"one_shot": one_shot, "linear": linear, "cubic": cubic}
