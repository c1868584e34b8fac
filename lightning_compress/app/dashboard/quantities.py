"""The figures of a run under flat names, and what is to be said of each: label, unit, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning_compress.app.dashboard.reading import number, section, text

__all__ = ["costs", "describe", "metrics"]

_COSTS = {
    "macs": ("MACs per sample", "MACs", "count"),
    "params": ("parameters", "params", "count"),
    "bytes": ("size on disk", "on disk", "bytes"),
    "peak_memory": ("peak memory, batch 1", "memory", "bytes"),
    "onnx_bytes": ("ONNX file", "ONNX file", "bytes"),
}
_TIMES = {
    "latency": ("latency, batch {}", "latency b{}"),
    "cpu_time": ("CPU time, batch {}", "CPU b{}"),
    "onnx_latency": ("ONNX Runtime, batch {}", "ONNX b{}"),
}
_TIME = re.compile(r"(.+)_b(\d+)")
_LESS_IS_BETTER = re.compile(
    r"loss|err(or)?\b|mse|mae|rmse|nll|perplexity|ece|calibration|(^|/|_)kl($|_)", re.IGNORECASE
)


def metrics(results: dict[str, Any], side: str) -> dict[str, float]:
    """What a network was scored with.

    Args:
        results: what `results.json` holds.
        side: `dense` or `final`.

    Example:
        >>> alone = {"metric": {"name": "val/acc", "dense": 0.9, "compressed": 0.8}}
        >>> metrics(alone, "final"), metrics({"metrics": {"final": {"test/acc": 0.7}}, **alone}, "final")
        ({'val/acc': 0.8}, {'val/acc': 0.8, 'test/acc': 0.7})
    """
    reported = section(results, "metric")
    key = "compressed" if side == "final" and results.get("compressed", True) is not None else "dense"
    found = {text(reported.get("name")): number(reported.get(key))} if reported else {}
    found |= {name: number(value) for name, value in section(section(results, "metrics"), side).items()}
    return {name: value for name, value in found.items() if name and value is not None}


def costs(results: dict[str, Any], side: str) -> dict[str, float]:
    """What a network costs, latencies as medians in milliseconds.

    Args:
        results: what `results.json` holds.
        side: `dense` or `compressed`.
    """
    footprint, deployed = section(results, side), section(section(results, "deployed"), side)
    found: dict[str, Any] = {key: footprint.get(key) for key in ("macs", "params", "bytes", "peak_memory")}
    for size, times in section(footprint, "latency").items():
        for key, clock in (("latency", "wall"), ("cpu_time", "cpu")):
            found[f"{key}_b{size}"] = section(section({"": times}, ""), clock).get("median")
    found["onnx_bytes"] = deployed.get("bytes")
    for size, times in section(deployed, "latency").items():
        found[f"onnx_latency_b{size}"] = section(section({"": times}, ""), "wall").get("median")
    return {key: value for key, value in ((key, number(value)) for key, value in found.items()) if value is not None}


def describe(keys: Iterable[str]) -> list[dict[str, Any]]:
    """What there is to choose from, in the order in which it is offered.

    Returns:
        For each: `key`, `label`, `short` (for the head of a column), `kind` (`metric`, `count`, `bytes` or `ms`) and
        `up`, whether more is better.

    Example:
        >>> [entry["label"] for entry in describe(["latency_b32", "macs", "test/acc"])]
        ['test/acc', 'MACs per sample', 'latency, batch 32']
    """
    entries = []
    for key in keys:
        time = _TIME.fullmatch(key)
        if key in _COSTS:
            label, short, kind = _COSTS[key]
            rank: tuple[Any, ...] = (1, list(_COSTS).index(key), 0)
        elif time is not None and time[1] in _TIMES:
            (label, short), kind = (name.format(time[2]) for name in _TIMES[time[1]]), "ms"
            rank = (2, list(_TIMES).index(time[1]), int(time[2]))
        else:
            label, short, kind = key, key, "metric"
            rank = (0, _LESS_IS_BETTER.search(key) is not None, not key.startswith("test/"))
        up = kind == "metric" and _LESS_IS_BETTER.search(key) is None
        entries.append(((*rank, key), {"key": key, "label": label, "short": short, "kind": kind, "up": up}))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
