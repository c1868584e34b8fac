"""The hash of hashed weights: the same on every machine and in every version, so that no file needs to hold it."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

__all__ = ["hash_codes", "splitmix64"]


def splitmix64(count: int, seed: int = 0) -> NDArray[np.uint64]:
    """The first numbers of the generator SplitMix64, [count], in integer arithmetic that every machine does alike.

    Steele, Lea and Flood 2014, 'Fast splittable pseudorandom number generators' (OOPSLA). Number i is a mix of
    seed + (i + 1) * 0x9E3779B97F4A7C15 alone, modulo 2^64, so this is a hash of i.

    Example:
        >>> splitmix64(2, seed=1234567).tolist()
        [6457827717110365317, 3203168211198807973]
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


@functools.lru_cache(maxsize=8)
def _codes(count: int, values: int, seed: int) -> NDArray[np.int32]:
    drawn = splitmix64(count, seed)
    bucket = (drawn >> np.uint64(1)) % np.uint64(values)
    codes = (bucket + np.uint64(values) * (drawn & np.uint64(1))).astype(np.int32)
    codes.setflags(write=False)
    return codes


def hash_codes(count: int, values: int, seed: int = 0) -> NDArray[np.int32]:
    """What each weight of a hashed layer is: its place among the values followed by their negatives.

    Args:
        count: number of weights.
        values: number of values.
        seed: of the hash, at least 0 and below 2^64.

    Returns:
        (h >> 1) mod values + values * (h & 1), with h the hash of the weight's index by `splitmix64`, [count]. Values
        collide: of as many values as weights, about a third (1 / e) is used by no weight.
    """
    return _codes(count, values, seed).copy()
