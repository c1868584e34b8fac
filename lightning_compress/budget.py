"""Budgets: what a compressed network is allowed to cost, and how much to cut to get there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

__all__ = ["Budget", "BudgetError", "as_fraction", "bisect", "meant_as_share", "require_budget"]


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
        >>> Budget(macs=50.0)
        Traceback (most recent call last):
        ValueError: Budget(macs=...) must be a fraction ..., got 50.0; for 50 % give 0.5
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
                    f"{as_fraction(value)}"
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


def require_budget(value: object, example: str = "Budget(macs=0.5)") -> None:
    """Raise unless it is a budget: a number alone does not say of what.

    Args:
        value: what came.
        example: what could have.

    Raises:
        ValueError: it is none.

    Example:
        >>> require_budget(0.5)
        Traceback (most recent call last):
        ValueError: `budget` must be a Budget, e.g. Budget(macs=0.5), got 0.5
    """
    if not isinstance(value, Budget):
        raise ValueError(f"`budget` must be a Budget, e.g. {example}, got {value!r}")


def as_fraction(value: object) -> str:
    """The end of a message about a number that is no fraction, if it looks like a percentage; else empty.

    Example:
        >>> as_fraction(90), as_fraction("50%"), as_fraction(1.5)
        ('; for 90 % give 0.9', '; for 50 % give 0.5', '')
    """
    try:
        number = float(str(value).strip().removesuffix("%"))
    except ValueError:
        return ""
    return f"; for {number:g} % give {number / 100:g}" if 2 <= number < 100 else ""


def meant_as_share(unit: str, limit: float) -> str:
    """The end of a message about a limit that cannot be met, if it looks like a percentage; else empty.

    Example:
        >>> meant_as_share("macs", 50.0)
        '. 50 is an absolute number of macs: for 50 % of the dense network write Budget(macs=0.5)'
        >>> meant_as_share("macs", 41_504.0)
        ''
    """
    if not (2 <= limit < 100 and float(limit).is_integer()):
        return ""
    return (
        f". {limit:.0f} is an absolute number of {unit}: for {limit:.0f} % of the dense network write "
        f"Budget({unit}={limit / 100:g})"
    )


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
