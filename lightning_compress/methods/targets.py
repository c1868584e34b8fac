"""Targets: the kinds of processor that quantized networks run on, and what each of them can do."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_compress.grids import Grid

__all__ = ["TARGETS", "Target", "this_machine"]


@dataclass(frozen=True)
class Target:
    """What a processor can do.

    Attributes:
        weight_bits: the most bits of a weight. Without VNNI, x86 processors add two products of 8-bit numbers in 16
            bits, which saturates; weights of 7 bits cannot.
        unsigned: whether values are unsigned with a zero point; if not, signed and symmetric.
        note: why, for the report.
    """

    weight_bits: int
    unsigned: bool
    note: str

    def weights(self, bits: int) -> Grid:
        """The grid of weights of so many bits."""
        return Grid.signed(min(bits, self.weight_bits))

    def values(self, bits: int) -> Grid:
        """The grid of values of so many bits."""
        return Grid.unsigned(bits) if self.unsigned else Grid.signed(bits)


TARGETS: Mapping[str, Target] = {
    "avx2": Target(7, True, "weights of 7 bits: without VNNI sums of 8-bit products saturate in 16 bits"),
    "vnni": Target(8, True, "weights of 8 bits"),
    "arm": Target(8, True, "weights of 8 bits"),
    "gpu": Target(8, False, "weights and values of 8 bits, symmetric"),
}


def this_machine() -> str:
    """The target that this machine's processor is.

    Example:
        >>> this_machine() in TARGETS
        True
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "avx2"  # not known, so what is right on every processor
    return "vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "avx2"
