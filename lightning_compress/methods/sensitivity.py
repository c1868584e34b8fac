"""Sensitivity: how much a network's outputs suffer when channels of a layer are missing.

Li et al. 2017 ('Pruning filters for efficient convnets', arXiv 1608.08710, section 3.2) prune each layer alone, look at
what the network loses, and prune sensitive layers less. Here that is measured, on a few inputs without labels, and
becomes a prior: scores of the channels of a layer are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_compress.calls import Call, batch_size, resize_batch
from lightning_compress.coupling import Coupling, Group
from lightning_compress.methods.criteria import Scores
from lightning_compress.quiet import undisturbed, without_observers
from lightning_compress.waiting import following

__all__ = ["measure_sensitivity", "weigh", "without_worst"]

SAMPLES = 64
"""Inputs that the network is run on, for each layer."""

SHARE = 0.5
"""Of a layer's channels, the worst, that are taken out to see what happens."""


def measure_sensitivity(
    coupling: Coupling, scores: Scores, calls: Sequence[Call], share: float = SHARE, samples: int = SAMPLES
) -> npt.NDArray[np.float64]:
    """For each layer: the relative error of the network's outputs when the worst of its channels are zero.

    As Li et al. 2017 (arXiv 1608.08710, section 3.2) prune each layer alone; by outputs, so that no labels are needed.
    One run of the network on `samples` inputs for each layer, and one more; in evaluation mode, without gradients. The
    network is not touched: it is called with other tensors in the place of its own.

    Args:
        coupling: the traced network.
        scores: one for each class of the coupling.
        calls: calibration data; of each call as many samples are taken, from its beginning.
        share: of the layer's channels that are taken out, at least one.
        samples: how many inputs, at most (one of each call at least).

    Returns:
        One error for each of the coupling's groups, in their order: the root of the sum of squared differences over
        that of squared outputs; 1 where a layer has no scores.

    Raises:
        ValueError: outputs that are not finite; a network that returns nothing, or only zeros.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> from lightning_compress.coupling import trace_coupling
        >>> from lightning_compress.methods.criteria import score_channels
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> _ = nn.init.zeros_(net[4].weight)  # so that what the layers before it do is of no use
        >>> coupling = trace_coupling(net, torch.randn(8, 4))
        >>> measure_sensitivity(coupling, score_channels(coupling, "l2"), as_calls(torch.randn(8, 4)))
        array([0., 0.])
    """
    model = coupling.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    total = sum(batch_size([call]) for call in calls)
    few = [
        resize_batch([call], max(1, min(b, samples * b // total)))[0] for call in calls for b in [batch_size([call])]
    ]
    found = np.ones(len(coupling.groups))
    with without_observers(model), undisturbed(model):
        expected = _outputs(model, few, {})
        size = sum(float(y.square().sum()) for y in expected)
        if not 0 < size < np.inf:
            raise ValueError(
                f"sensitivity needs outputs that are finite and not all zero; their squares sum up to {size}"
            )
        for index, group in following(enumerate(coupling.groups), "measuring the sensitivity of layers"):
            own = scores[group.classes]
            if np.isnan(own).any():
                continue
            zeroed = {
                alias: tensor
                for name, tensor in without_worst(coupling, group, own, share).items()
                for alias in names[id(parameters[name])]
            }
            torch.manual_seed(0)
            outputs = _outputs(model, few, zeroed)
            error = sum(float((y - e).square().sum()) for y, e in zip(outputs, expected, strict=True))
            if not np.isfinite(error):
                raise ValueError(f"the outputs are not finite when half of the channels of {group.name!r} are zero")
            found[index] = (error / size) ** 0.5
    return found


def without_worst(coupling: Coupling, group: Group, scores: npt.NDArray[np.float64], share: float) -> dict[str, Tensor]:
    """The parameters of a layer with the worst of its channels at zero, wherever those live.

    Args:
        coupling: the traced network.
        group: the layer, one of the coupling's groups.
        scores: one for each of its channels; the lowest go.
        share: of them that goes, at least one.

    Returns:
        Name -> a tensor of the same shape, for every parameter that holds such a channel.
    """
    parameters = dict(coupling.model.named_parameters(remove_duplicate=False))
    worst = group.classes[np.argsort(scores, kind="stable")[: max(1, int(share * len(scores)))]]
    zeroed: dict[str, Tensor] = {}
    for name, dim in group.locations:
        if name in parameters:
            tensor = zeroed.get(name, parameters[name].detach())
            gone = torch.from_numpy(np.flatnonzero(np.isin(coupling.locations[name, dim], worst)))
            zeroed[name] = tensor.index_fill(dim, gone.to(tensor.device), 0.0)
    return zeroed


def weigh(coupling: Coupling, scores: Scores, sensitivity: npt.NDArray[np.float64], power: float) -> Scores:
    """Scores times sensitivity^power, relative to the mean over layers.

    Sensitivities of layers differ by factors, and the scores of a layer often by no more than a tenth: a power of 0.1
    is a prior that scores can outweigh; from 0.5 on it is mostly whole layers that are taken, one after another.

    Args:
        coupling: the traced network.
        scores: one for each class.
        sensitivity: one for each group, from `measure_sensitivity`.
        power: 0: all layers are alike; 1: in proportion.
    """
    weighed = scores.copy()
    factors = (sensitivity / (sensitivity.mean() or 1.0)) ** power
    for group, factor in zip(coupling.groups, factors, strict=True):
        weighed[group.classes] *= factor
    return weighed


def _outputs(model: nn.Module, calls: Sequence[Call], replaced: dict[str, Tensor]) -> list[Tensor]:
    """What the network returns, in double precision, with other tensors in the place of some of its own."""
    found: list[Tensor] = []
    for call in calls:
        prefix = f"{call.path}." if call.path else ""
        inside = {name.removeprefix(prefix): t for name, t in replaced.items() if name.startswith(prefix)}
        output: Any = functional_call(model.get_submodule(call.path), inside, call.args, dict(call.kwargs))
        found += [
            leaf.double()
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
    return found
