"""How long layers take, and what they may become: for budgets of latency, which arithmetic tells little about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call
from lightning_compress.edits import build
from lightning_compress.latency import compare_latency
from lightning_compress.methods.approximation import Candidate, Form
from lightning_compress.methods.measured import BUDGET_BATCH
from lightning_compress.methods.replaceable import Layer

__all__ = ["time_candidates"]

TIMED = 8
"""Candidates of a layer that are timed."""

REPEATS, SECONDS = 7, 1.0
"""How often each is timed, and about how long those of one layer may take together."""


def time_candidates(
    model: nn.Module, layers: Sequence[Layer], forms: Mapping[str, Form], candidates: Mapping[str, Sequence[Candidate]]
) -> dict[str, dict[Any, float]]:
    """Time layers against what they may become, in turns. Layers that are alike are timed once.

    Args:
        model: the network; it says on which device.
        layers: the layers.
        forms: path -> form.
        candidates: path -> candidates, of which some are timed, spread over them.

    Returns:
        Path -> rank -> microseconds of a batch; the rank None is the layer as it is.
    """
    known: dict[str, dict[Any, float]] = {}
    times = {}
    like = torch.empty(0, dtype=torch.float32, device=next(model.parameters()).device)
    for layer in layers:
        form, offered = forms[layer.path], candidates[layer.path]
        picked = [candidate.rank for candidate in offered[:: max(1, len(offered) // TIMED)]]
        key = repr((form, layer.spec, layer.places, picked))
        if key not in known:
            ranks: dict[str, Any] = {"": None, **{str(rank): rank for rank in picked}}
            calls = [Call((_example(layer, count, size),)) for count, size in layer.places]
            sides = {
                name: (build(layer.spec if rank is None else form.spec(layer.geometry, rank), like), calls)
                for name, rank in ranks.items()
            }
            found = compare_latency(sides, (BUDGET_BATCH,), repeats=REPEATS, seconds=SECONDS)
            known[key] = {rank: 1e3 * found[name][BUDGET_BATCH].wall.median for name, rank in ranks.items()}
        times[layer.path] = known[key]
    return times


def _example(layer: Layer, count: int, size: tuple[int, ...]) -> Tensor:
    """What the layer sees of one sample; its values do not matter."""
    if size:
        return torch.zeros(count, layer.geometry.inputs, *size)
    return torch.zeros(1, *([count] if count > 1 else []), layer.geometry.inputs)
