"""How long networks take, measured so that the numbers can be compared: side by side, in turn, with their range."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_compress.calls import Call, resize_batch, run_calls
from lightning_compress.quiet import undisturbed, without_observers
from lightning_compress.waiting import working

__all__ = ["BATCH_SIZES", "Latency", "Spread", "compare_latency"]

BATCH_SIZES = (1, 32)
_MIN_REPEATS = 5
_BLOCK_SECONDS = 0.002  # shorter runs are timed several at once: clocks and interpreter jitter would drown them


@dataclass(frozen=True)
class Spread:
    """Repeated times, in milliseconds for one batch.

    Attributes:
        median: the middle one.
        low: the shortest.
        high: the longest.

    Example:
        >>> Spread(median=2.0, low=1.9, high=2.4).median
        2.0
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """The time of one batch, in milliseconds.

    Attributes:
        wall: wall time, with `threads` threads.
        cpu: CPU time of the process with a single thread; on a busy machine it is steadier than wall time.
        batch_size: samples in the batch.
        repeats: how many times were taken.
        threads: torch's threads within an operation, for `wall`.
        load: the machine's load average over the last minute when it was measured; None where it cannot be read.
        device: where it ran.
        runtime: what ran it.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> found = compare_latency({"net": (nn.Linear(2, 2), as_calls(torch.zeros(1, 2)))}, (4,), repeats=5)["net"][4]
        >>> found.batch_size, found.wall.low <= found.wall.median <= found.wall.high, found.runtime
        (4, True, 'eager')
    """

    wall: Spread
    cpu: Spread
    batch_size: int
    repeats: int
    threads: int
    load: float | None
    device: str
    runtime: str = "eager"

    def to_json(self) -> dict[str, Any]:
        """The latency as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Latency:
        """The inverse of `to_json`."""
        return cls(**{**data, "wall": Spread(**data["wall"]), "cpu": Spread(**data["cpu"])})


def compare_latency(
    sides: Mapping[str, tuple[nn.Module, Sequence[Call]]],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    repeats: int = 20,
    warmup: int = 3,
    seconds: float = 10.0,
) -> dict[str, dict[int, Latency]]:
    """Time networks against each other, in eager torch.

    After a warm-up the sides run in turn, in alternating order, so that what disturbs the machine disturbs all of
    them; medians are given with their range. Each network is in eval mode and without gradients, and is left as it was.

    Args:
        sides: name -> (network, its recorded calls); the calls are brought to each batch size and to the device.
        batch_sizes: samples in a batch.
        repeats: how many times to take of each side.
        warmup: untimed runs of each side before.
        seconds: about how many seconds one batch size may take; where that is short, repeats are saved, down to five.

    Returns:
        Name -> batch size -> latency.

    Raises:
        ValueError: no sides, or a number below one.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> times = compare_latency({"net": (nn.Linear(2, 2), as_calls(torch.zeros(1, 2)))}, (1, 4), repeats=5)
        >>> sorted(times["net"])
        [1, 4]
    """
    if not sides or not batch_sizes or min(*batch_sizes, repeats, warmup) < 1:
        raise ValueError(
            "compare_latency needs at least one side and one batch size, and whole numbers of at least 1, got "
            f"{len(sides)} sides, batch_sizes={tuple(batch_sizes)}, repeats={repeats}, warmup={warmup}"
        )
    with ExitStack() as stack:
        for model, _ in sides.values():
            stack.enter_context(without_observers(model))
            stack.enter_context(undisturbed(model))
        stack.enter_context(working("measuring latency"))
        by_size = {size: _compare(sides, size, repeats, warmup, seconds) for size in batch_sizes}
    return {name: {size: by_size[size][name] for size in batch_sizes} for name in sides}


def _compare(
    sides: Mapping[str, tuple[nn.Module, Sequence[Call]]], size: int, repeats: int, warmup: int, seconds: float
) -> dict[str, Latency]:
    runs = {name: _runner(model, calls, size) for name, (model, calls) in sides.items()}
    counts, cost = {}, 0.0
    for name, run in runs.items():
        run(warmup)
        once = run(1)[0]
        counts[name] = max(1, math.ceil(_BLOCK_SECONDS / once)) if once > 0 else 1
        cost += once * counts[name]
    repeats = max(min(repeats, _MIN_REPEATS), min(repeats, int(seconds / 2 / cost) if cost > 0 else repeats))
    threads = torch.get_num_threads()
    wall = _alternate(runs, counts, repeats)
    cpu = wall
    if threads > 1:
        with _single_thread():
            for run in runs.values():
                run(1)
            cpu = _alternate(runs, counts, repeats)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        name: Latency(
            wall=_spread([times[0] for times in wall[name]]),
            cpu=_spread([times[1] for times in cpu[name]]),
            batch_size=size,
            repeats=repeats,
            threads=threads,
            load=load,
            device=_device(sides[name][0]).type,
        )
        for name in sides
    }


def _alternate(
    runs: Mapping[str, Callable[[int], tuple[float, float]]], counts: Mapping[str, int], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            wall, cpu = runs[name](counts[name])
            times[name].append((wall / counts[name], cpu / counts[name]))
    return times


def _runner(model: nn.Module, calls: Sequence[Call], size: int) -> Callable[[int], tuple[float, float]]:
    device = _device(model)
    batch = tuple(call.map(lambda tensor: tensor.to(device)) for call in resize_batch(calls, size))

    def run(count: int) -> tuple[float, float]:
        """Wall and CPU seconds of `count` runs."""
        _finish(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            run_calls(model, batch)
        _finish(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(*(1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds))))
