"""Which way each weight is rounded, so that the layer gives what it gave: the integers of least output error.

To the nearest is best for a weight alone, but not for the outputs of a layer, in which errors add up or cancel (Nagel
et al. 2020, AdaRound, arXiv 2004.10568). The output error is a quadratic in the weights, whose coefficients are the
second moments of the inputs. As in optimal brain compression (Frantar and Alistarh 2022, arXiv 2208.11580) and GPTQ
(Frantar et al. 2022, arXiv 2210.17323), weights are rounded one after another, and the error of each is made up for by
those not rounded yet. Layers are taken in the order that data reaches them, on the inputs that the rounded layers
before them give, and biases take up what their means have moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, batch_size, resize_batch
from lightning_compress.grids import Grid, round_to
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Moments, Objective
from lightning_compress.methods.quantization import quantized_weights
from lightning_compress.methods.replaceable import find_layers
from lightning_compress.methods.sequential import Data
from lightning_compress.waiting import following
from lightning_compress.wording import require_choice

__all__ = ["ROUNDINGS", "fit_rounding", "round_jointly"]

SAMPLES = 128
"""Of the calibration data, that moments are taken of."""

ROUNDINGS = ("nearest", "corrected", "joint")
"""To the nearest; the same with biases that take up what the means have moved (Nagel et al. 2019, arXiv 1906.04721);
weights rounded together, and biases corrected."""


def fit_rounding(model: nn.Module, quantized: nn.Module, calls: Sequence[Call], rounding: str) -> dict[str, float]:
    """Round the weights of a quantized network for good, and correct its biases.

    Args:
        model: the network as it was.
        quantized: a copy of it that was quantized and calibrated; its weights and biases are set.
        calls: calibration data.
        rounding: one of `ROUNDINGS`.

    Returns:
        Path of a layer -> output error that is left, relative to the energy of the outputs.

    Raises:
        ValueError: an unknown rounding.
    """
    require_choice("rounding", rounding, ROUNDINGS)
    if rounding == "nearest":
        return {}
    calls = _some(calls)
    layers = find_layers(model, calls, {})
    steps = {name: (weight, step, grid) for name, weight, step, grid in quantized_weights(quantized)}
    errors = {}
    for layer in following(layers.found, "rounding layers"):
        entry = steps.get(f"{layer.path}.weight".lstrip("."))
        if entry is None or not layer.informed:
            continue
        weight, step, grid = entry
        data = Data(replace(layer, scale=None), model, quantized, layers, calls)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few samples: what they leave open stays near the weights
            moments = data.moments(Moments(layer.geometry))
        objective = moments.objective(layer.centred)
        trained = _matrix(layer.geometry, weight)
        wide = _matrix(layer.geometry, step.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
        rounded = _nearest(trained, wide, grid)
        if rounding == "joint":
            together = round_jointly(objective.solution(trained), objective, wide, grid)
            better = _errors(together, objective) < _errors(rounded, objective)  # one after another may lose, too
            rounded = torch.where(better[..., None], together, rounded)
        with torch.no_grad():
            weight.copy_(round_to(_weight(layer.geometry, rounded, weight), step, None, grid))
            offset = objective.offset(rounded)
            bias = data.correct(offset)
            own = quantized.get_submodule(layer.path)._parameters.get("bias")
            if own is not None and bias is not None and offset is not None:
                own.copy_(bias)
        errors[layer.path] = objective.error(rounded)
    return errors


def _some(calls: Sequence[Call]) -> list[Call]:
    """As many calls as give enough samples: an image has hundreds of places."""
    found: list[Call] = []
    for call in calls:
        left = SAMPLES - sum(batch_size([other]) for other in found)
        if left <= 0:
            break
        found += resize_batch([call], min(left, batch_size([call])))
    return found


def round_jointly(weight: Tensor, objective: Objective, step: Tensor, grid: Grid) -> Tensor:
    """Multiples of a step near a weight, whose output error is small.

    Args:
        weight: [G, O, d].
        objective: the output error.
        step: of each weight, like it.
        grid: the integers.

    Returns:
        The rounded weight, like it.
    """
    if objective.second is None:
        return _nearest(weight, step, grid)
    rows = weight.shape[-1]
    second = objective.second + objective.ridge * torch.eye(rows, dtype=weight.dtype, device=weight.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    left, rounded = weight.clone(), torch.empty_like(weight)
    for column in range(rows):
        rounded[..., column] = _nearest(left[..., column], step[..., column], grid)
        error = (left[..., column] - rounded[..., column]) / factor[:, column, column, None]
        left[..., column:] -= error[..., None] * factor[:, column, None, column:]
    return rounded


def _errors(matrix: Tensor, objective: Objective) -> Tensor:
    """The squared error of each output, but for what no weight changes: [G, O]."""
    return ((objective.apply(matrix) - 2 * objective.cross) * matrix).sum(-1)


def _nearest(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    return (weight / step).round().clamp(grid.low, grid.high) * step


def _matrix(geometry: Geometry, weight: Tensor) -> Tensor:
    """[G, O, d]."""
    canonical: Tensor = geometry.canonical(weight.detach().double())
    return canonical.flatten(2)


def _weight(geometry: Geometry, matrix: Tensor, like: Tensor) -> Tensor:
    """As the layer has it."""
    canonical = geometry.canonical(like.detach().double())
    return geometry.native(matrix.view_as(canonical)).to(like.dtype)
