"""Budgets: what a compressed network is allowed to cost, and how much to cut to get there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

__all__ = ["Budget", "BudgetError", "bisect"]


class BudgetError(ValueError):
    """A budget that cannot be met; the message says the lowest that can."""


@dataclass(frozen=True)
class Budget:
    """What the compressed network may cost at most.

    A float in (0, 1] is a fraction of the dense network; an integer above 1 is an absolute number. Several may be
    given: all are met.

    Attributes:
        macs: multiply-accumulates of one sample.
        params: parameters.
        bytes: size of the file.
        bit_operations: multiply-accumulates of one sample, each times the bits of its weight and of its value; those of
            a network that is not quantized have 32 and 32. For quantization alone.
        latency: of a batch of 32 in eager torch on this machine; an integer is microseconds.

    Raises:
        ValueError: nothing was given, or a value out of range.

    Example:
        >>> Budget(macs=0.5).limits({"macs": 1000.0})
        {'macs': 500.0}
        >>> Budget(macs=1.5)
        Traceback (most recent call last):
        ValueError: Budget(macs=...) must be a fraction in (0, 1] or an absolute integer above 1, got 1.5
    """

    macs: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    latency: float | int | None = None
    bit_operations: float | int | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if not given:
            raise ValueError(f"Budget needs at least one of {', '.join(asdict(self))}, e.g. Budget(macs=0.5)")
        for unit, value in given.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and (0 < value <= 1 or (isinstance(value, int) and value > 1))
            if not fits:
                raise ValueError(
                    f"Budget({unit}=...) must be a fraction in (0, 1] or an absolute integer above 1, got {value!r}"
                )

    def given(self) -> dict[str, float | int]:
        """The units that were asked for, with their values as given."""
        return {unit: value for unit, value in asdict(self).items() if value is not None}

    def limits(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Absolute limits, from what the dense network costs in each unit.

        Raises:
            ValueError: a unit that `dense` does not have.
        """
        self.refuse(*(unit for unit in asdict(self) if unit not in dense))
        return {unit: float(value * dense[unit] if value <= 1 else value) for unit, value in self.given().items()}

    def refuse(self, *units: str) -> None:
        """Raise if the budget is in a unit that a method knows nothing of.

        Raises:
            ValueError: it is.
        """
        for unit in units:
            if unit in self.given():
                others = ", ".join(name for name in asdict(self) if name not in units)
                raise ValueError(f"this method cannot keep a budget of {unit}; it can of {others}")

    def relaxed(self, fraction: float, dense: Mapping[str, float]) -> dict[str, float]:
        """Limits on the way: `fraction` of the distance from the dense network (0) to the budget (1)."""
        limits = self.limits(dense)
        return {
            unit: dense[unit] + fraction * (min(limit, dense[unit]) - dense[unit]) for unit, limit in limits.items()
        }


def bisect(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest n in [low, high] with `fits(n)`, for a `fits` that stays true once it is; None if there is none.

    Example:
        >>> bisect(lambda n: n * n >= 50, 0, 100)
        8
    """
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
