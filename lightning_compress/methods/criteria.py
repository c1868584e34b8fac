"""Criteria: how much a channel matters. Each is one function from the coupled network to a score for each index.

A criterion scores the indices of every dim that channels live in; `score_channels` brings those onto the channels,
averages over the places where a channel lives and divides by the layer's mean, so that layers compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_compress.calls import Call
from lightning_compress.coupling import Coupling, Location
from lightning_compress.methods.calibration import input_norms
from lightning_compress.methods.regularization import NORMS
from lightning_compress.methods.sparsity import lamp as relative_to_above
from lightning_compress.wording import require_choice

__all__ = [
    "CRITERIA",
    "GATHERED",
    "Criterion",
    "Place",
    "Scores",
    "activation_terms",
    "check_criterion",
    "gradient_terms",
    "score_channels",
]

Scores = npt.NDArray[np.float64]
Saliency = Mapping[Location, Tensor]


@dataclass(frozen=True)
class Place:
    """A dim that channels live in, as a criterion sees it.

    Attributes:
        module: the module that owns the weight.
        leaf: what the module calls it.
        weight: the parameter, detached.
        dim: the dim of it.
        saliency: what was gathered for this dim, one term for each index, if anything was.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3)
        >>> place = Place(layer, "weight", layer.weight.detach(), 0)
        >>> CRITERIA["l2"](place).shape  # a criterion of your own takes such a place, and gives a score for each index
        torch.Size([8])
    """

    module: nn.Module
    leaf: str
    weight: Tensor
    dim: int
    saliency: Tensor | None = None


Criterion = Callable[[Place], Tensor | None]
"""A score for each index of the dim; None where the criterion has nothing to say."""


def l1(place: Place) -> Tensor | None:
    """Mean absolute weight (Li et al. 2017, arXiv 1608.08710)."""
    return _norm(place, 1)


def l2(place: Place) -> Tensor | None:
    """Root mean square of the weights (He et al. 2018, arXiv 1808.06866)."""
    return _norm(place, 2)


def _norm(place: Place, order: int) -> Tensor | None:
    """The mean-normalised p-norm of each slice; None for vectors, which only scale and shift."""
    weight = place.weight
    if weight.dim() < 2:
        return None
    others = [d for d in range(weight.dim()) if d != place.dim]
    precise = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight, order, others, dtype=precise)
    norm /= (weight.numel() / weight.shape[place.dim]) ** (1 / order)
    return norm


def fpgm(place: Place) -> Tensor | None:
    """Mean distance to the layer's other filters: the middle is redundant (He et al. 2019, arXiv 1811.00250)."""
    if place.weight.dim() < 2 or place.dim != 0:
        return None
    rows = place.weight.flatten(1).float()
    return torch.cdist(rows, rows).mean(1)


def bn_scale(place: Place) -> Tensor | None:
    """Absolute scale of the norm that follows, as network slimming has it (Liu et al. 2017, arXiv 1708.06519)."""
    return place.weight.abs().float() if isinstance(place.module, NORMS) and place.leaf == "weight" else None


def taylor(place: Place) -> Tensor | None:
    """First-order change of the loss when a slice goes, squared (Molchanov et al. 2019, arXiv 1906.10771)."""
    return place.saliency


def fisher(place: Place) -> Tensor | None:
    """Second-order change of the loss by a diagonal Hessian, as optimal brain damage (LeCun et al. 1989).

    The diagonal is that of the empirical Fisher information, squared gradients: sum of (weight x gradient)^2.
    """
    return place.saliency


def activation(place: Place) -> Tensor | None:
    """Root mean square of the channel where it is used (after Hu et al. 2016, 'Network trimming', arXiv 1607.03250)."""
    return place.saliency


def lamp(place: Place) -> Tensor | None:
    """The norm `l2`; `score_channels` relates it to the layer's channels above it (Lee et al. 2021, 2010.07611)."""
    return _norm(place, 2)


def random(place: Place) -> Tensor | None:
    """Noise from torch's generator: the baseline that any criterion must beat."""
    return torch.rand(place.weight.shape[place.dim])


CRITERIA: dict[str, Criterion] = {  # names of your own may be added
    "l1": l1,
    "l2": l2,
    "fpgm": fpgm,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "fisher": fisher,
    "activation": activation,
    "lamp": lamp,
    "random": random,
}


GATHERED = ("taylor", "fisher")
"""Those whose terms are summed up over steps of training."""


def check_criterion(name: str) -> None:
    """Raise unless `name` is a criterion.

    Args:
        name: of the criterion.

    Raises:
        ValueError: it is none; the message has the list of what there is.

    Example:
        >>> check_criterion("l2")
    """
    require_choice("criterion", name, CRITERIA)


def gradient_terms(
    coupling: Coupling, tensors: Mapping[str, Tensor], gathered: Saliency | None = None, criterion: str = "taylor"
) -> dict[Location, Tensor]:
    """The terms of one step for each slice.

    `taylor`: the square of the sum of gradient x weight; `fisher`: the sum of the squares.

    Args:
        coupling: says which dims channels live in.
        tensors: parameters by name, with gradients; those without one are left out.
        gathered: terms of the steps before, which are added.
        criterion: which.

    Returns:
        Location -> float32 vector of shape [C], one term for each index.

    Example:
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> terms = gradient_terms(trace_coupling(net, torch.zeros(1, 4)), dict(net.named_parameters()))
        >>> terms["0.weight", 0].shape
        torch.Size([3])
    """
    terms = dict(gathered or {})
    for (name, dim), classes in coupling.locations.items():
        parameter = tensors.get(name)
        if parameter is None or parameter.grad is None or coupling.frozen[classes].all():
            continue
        product = (parameter.detach() * parameter.grad).float()
        product = product.square() if criterion == "fisher" else product
        term = product.transpose(0, dim).flatten(1).sum(1) if product.dim() > 1 else product
        term = term if criterion == "fisher" else term.square()
        terms[name, dim] = terms[name, dim] + term if (name, dim) in terms else term
    return terms


def activation_terms(coupling: Coupling, calls: Sequence[Call]) -> dict[Location, Tensor]:
    """How large the channels are that layers see, for the criterion `activation`.

    Args:
        coupling: the traced network.
        calls: calibration data.

    Returns:
        Location -> vector of shape [C]: the root mean square of each input channel.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> terms = activation_terms(trace_coupling(net, torch.zeros(1, 4)), as_calls(torch.ones(8, 4)))
        >>> terms["0.weight", 1]
        tensor([1., 1., 1., 1.])
    """
    return {(name, 1): norm for name, norm in input_norms(coupling.model, calls).items()}


def score_channels(coupling: Coupling, criterion: str, saliency: Saliency | None = None, seed: int = 0) -> Scores:
    """Score every channel: the mean over the places where it lives, relative to the mean of its layer.

    Args:
        coupling: the traced network.
        criterion: a name in `CRITERIA`.
        saliency: gathered terms, for criteria that need them (`taylor`, `fisher`, `activation`).
        seed: for criteria that draw (`random`).

    Returns:
        One score for each class of the coupling; NaN where the criterion has nothing to say.

    Raises:
        ValueError: unknown criterion; weights or scores that are not finite; nothing could be scored.

    Example:
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> for parameter in net.parameters():
        ...     _ = nn.init.ones_(parameter)
        >>> _ = nn.init.zeros_(net[0].weight[1])
        >>> coupling = trace_coupling(net, torch.zeros(1, 4))
        >>> int(score_channels(coupling, "l1")[coupling.groups[0].classes].argmin())
        1
    """
    check_criterion(criterion)
    parameters = dict(coupling.model.named_parameters(remove_duplicate=False))
    owners = dict(coupling.model.named_modules(remove_duplicate=False))
    total = np.zeros(coupling.count)
    places = np.zeros(coupling.count)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for (name, dim), classes in coupling.locations.items():
            if name not in parameters or coupling.frozen[classes].all():
                continue
            path, _, leaf = name.rpartition(".")
            found = (saliency or {}).get((name, dim))
            values = CRITERIA[criterion](Place(owners[path], leaf, parameters[name].detach(), dim, found))
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
        own = scores[group.classes]
        if criterion == "lamp":
            scores[group.classes] = relative_to_above(torch.from_numpy(own)).numpy()
        else:
            scores[group.classes] /= own.mean() or 1.0
    if coupling.groups and all(np.isnan(scores[group.classes]).any() for group in coupling.groups):
        gradients = "it needs gradients of at least one step"
        hint = {"taylor": gradients, "fisher": gradients, "bn_scale": "it needs norm layers with a scale"}
        needed = hint.get(criterion, "it has nothing to say of any weight of this network")
        raise ValueError(f"criterion {criterion!r} could score no layer; {needed}, so take another, e.g. 'l2'")
    return scores
