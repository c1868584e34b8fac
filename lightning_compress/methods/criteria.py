"""Criteria: how much a channel matters. Each is one function from the coupled network to a score for each index.

A criterion scores the indices of every dim that channels live in; `score_channels` brings those onto the channels,
averages over the places where a channel lives and divides by the layer's mean, so that layers compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_compress.coupling import Coupling, Location

__all__ = [
    "CRITERIA",
    "Criterion",
    "Scores",
    "add_sparsity_gradient",
    "check_criterion",
    "score_channels",
    "taylor_terms",
]

Scores = npt.NDArray[np.float64]
Saliency = Mapping[Location, Tensor]
Criterion = Callable[[nn.Module, str, int, Saliency], Tensor | None]
"""(model, tensor name, dim, gathered saliency) -> a score for each index of the dim; None: has nothing to say there."""


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _rows(model: nn.Module, name: str, dim: int) -> Tensor | None:
    """A weight as a matrix with one row for each index of `dim`; None for vectors, which only scale and shift."""
    weight = model.get_parameter(name).detach()
    return weight.transpose(0, dim).flatten(1).float() if weight.dim() > 1 else None


def l1(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """Mean absolute weight (Li et al. 2017, arXiv 1608.08710)."""
    rows = _rows(model, name, dim)
    return None if rows is None else rows.abs().mean(1)


def l2(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """Root mean square of the weights (He et al. 2018, arXiv 1808.06866)."""
    rows = _rows(model, name, dim)
    return None if rows is None else rows.square().mean(1).sqrt()


def fpgm(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """Mean distance to the layer's other filters: the middle is redundant (He et al. 2019, arXiv 1811.00250)."""
    rows = _rows(model, name, dim)
    return None if rows is None or dim != 0 else torch.cdist(rows, rows).mean(1)


def bn_scale(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """Absolute scale of the norm that follows, as network slimming has it (Liu et al. 2017, arXiv 1708.06519)."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return model.get_parameter(name).detach().abs().float() if isinstance(module, _NORMS) and leaf == "weight" else None


def taylor(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """First-order change of the loss when a slice goes, squared (Molchanov et al. 2019, arXiv 1906.10771)."""
    return saliency.get((name, dim))


def random(model: nn.Module, name: str, dim: int, saliency: Saliency) -> Tensor | None:
    """Noise from torch's generator: the baseline that any criterion must beat."""
    return torch.rand(model.get_parameter(name).shape[dim])


CRITERIA: Mapping[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "fpgm": fpgm,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "random": random,
}


def check_criterion(name: str) -> None:
    """Raise ValueError, with the list of what there is, unless `name` is a criterion."""
    if name not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {name!r}")


def add_sparsity_gradient(model: nn.Module, strength: float) -> None:
    """Add the gradient of `strength` x |scale| to every norm's scale (network slimming, Liu et al. 2017, 1708.06519).

    Args:
        model: the network, with gradients.
        strength: weight of the L1 term.
    """
    for module in model.modules():
        if isinstance(module, _NORMS) and module.weight is not None and module.weight.grad is not None:
            module.weight.grad.add_(module.weight.detach().sign(), alpha=strength)


def taylor_terms(coupling: Coupling, tensors: Mapping[str, Tensor]) -> dict[Location, Tensor]:
    """The squared first-order terms of one step, (sum of gradient x weight)^2 for each slice.

    Args:
        coupling: says which dims channels live in.
        tensors: parameters by name, with gradients; those without one are left out.

    Returns:
        Location -> float32 vector, one term for each index.
    """
    terms: dict[Location, Tensor] = {}
    for name, dim in coupling.locations:
        parameter = tensors.get(name)
        if (
            parameter is not None
            and parameter.grad is not None
            and not coupling.frozen[coupling.locations[name, dim]].all()
        ):
            product = (parameter.detach() * parameter.grad).float()
            terms[name, dim] = product.transpose(0, dim).flatten(1).sum(1).square() if product.dim() > 1 else product**2
    return terms


def score_channels(coupling: Coupling, criterion: str, saliency: Saliency | None = None, seed: int = 0) -> Scores:
    """Score every channel: the mean over the places where it lives, relative to the mean of its layer.

    Args:
        coupling: the traced network.
        criterion: a name in `CRITERIA`.
        saliency: gathered terms, for criteria that need them (`taylor`).
        seed: for criteria that draw (`random`).

    Returns:
        One score for each class of the coupling; NaN where the criterion has nothing to say.

    Raises:
        ValueError: unknown criterion; weights or scores that are not finite; nothing could be scored.

    Example:
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = nn.init.constant_(net[0].weight[1], 0.0)
        >>> coupling = trace_coupling(net, torch.zeros(1, 4))
        >>> int(score_channels(coupling, "l1")[coupling.groups[0].classes].argmin())
        1
    """
    check_criterion(criterion)
    parameters = dict(coupling.model.named_parameters(remove_duplicate=False))
    total = np.zeros(coupling.count)
    places = np.zeros(coupling.count)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for (name, dim), classes in coupling.locations.items():
            if name not in parameters or coupling.frozen[classes].all():
                continue
            values = CRITERIA[criterion](coupling.model, name, dim, saliency or {})
            if values is None:
                continue
            vector = values.double().cpu().numpy()
            if not np.isfinite(vector).all():
                raise ValueError(f"{criterion} scores of {name!r} are not finite: are there NaN or infinite weights?")
            scale = vector.mean() or 1.0
            np.add.at(total, classes, vector / scale)
            np.add.at(places, classes, 1.0)
    scores: Scores = np.divide(total, places, out=np.full(coupling.count, np.nan), where=places > 0)
    for group in coupling.groups:
        scores[group.classes] /= scores[group.classes].mean() or 1.0
    if coupling.groups and all(np.isnan(scores[group.classes]).any() for group in coupling.groups):
        hint = {"taylor": "it needs gradients of at least one step", "bn_scale": "it needs norm layers with a scale"}
        raise ValueError(f"criterion {criterion!r} could score no layer; {hint.get(criterion, '')}")
    return scores
