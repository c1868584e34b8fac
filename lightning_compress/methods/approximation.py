"""Approximating a layer by another form of it: block coordinate descent on a quadratic.

A *form* writes a layer's weight as a function of factors that is linear in each of them (a product of matrices, a sum
of separable kernels, filters shared under rotation). The output error is quadratic in the weight, hence in each factor
by itself: the last factor is found exactly where outputs do not depend on each other, the rest by conjugate gradients,
and each step can only lower the error. What the data does not determine stays where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import vjp

from lightning_compress.edits import Spec
from lightning_compress.methods.geometry import Geometry, weight_of
from lightning_compress.methods.moments import Objective

if TYPE_CHECKING:
    from lightning_compress.methods.sequential import Data

__all__ = ["Candidate", "Factors", "Form", "Init", "approximate", "leading", "reset", "whitening"]

Init = Literal["data", "weights", "random"]
"""Where new layers come from: outputs on data, the trained weights alone, or nothing (to show what the others gain)."""

Factors = tuple[Tensor, ...]
"""The weights of the layers of a form, in canonical form and in double precision; and choices, as integers."""

SWEEPS = 2
"""Rounds over all factors."""

ITERATIONS = 12
"""Steps of conjugate gradients for one factor, as long as a form does not say otherwise."""


@dataclass(frozen=True)
class Candidate:
    """One size that a form may take for a layer.

    Attributes:
        rank: the size, as the form names it: a rank, several, a ratio.
        error: predicted output error, relative to the energy of the layer's outputs.
    """

    rank: Any
    error: float


class Form(ABC):
    """One way to write a layer. Its instances hold its options and no data.

    Example:
        >>> from lightning_compress.methods.forms import COMPACT, DECOMPOSITIONS
        >>> [isinstance(form, Form) for form in (DECOMPOSITIONS["tucker"], COMPACT["ghost"]())]
        [True, True]
    """

    name: ClassVar[str]
    solves_outputs: ClassVar[bool] = True
    """Whether each output has its own entries of the last factor, [G, O, ...]."""
    steps: ClassVar[int] = ITERATIONS
    """Steps of conjugate gradients for one factor."""

    @abstractmethod
    def refuses(self, geometry: Geometry) -> str | None:
        """Why a layer cannot be written so; None if it can."""

    @abstractmethod
    def layers(self, geometry: Geometry, rank: Any) -> Sequence[Geometry]:
        """The plain layers of the chain, in the order of the factors; the last one has the bias."""

    @abstractmethod
    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """The sizes worth considering, from the largest to the smallest.

        Args:
            geometry: the layer.
            weight: its weight, canonical, in double precision.
            second: second moments of its patches; None: the identity.
        """

    @abstractmethod
    def start(self, geometry: Geometry, weight: Tensor, rank: Any, second: Tensor | None) -> Factors:
        """Factors near the best for a weight, in closed form.

        Args:
            geometry: the layer.
            weight: the weight to approximate, canonical, in double precision.
            rank: the size.
            second: the metric, second moments of its patches; None: the identity.
        """

    @abstractmethod
    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """The canonical weight that factors stand for."""

    def metric(self, objective: Objective) -> Tensor | None:
        """The metric in which `start` approximates the weight that is best for the outputs."""
        return objective.second

    def spec(self, geometry: Geometry, rank: Any) -> Spec:
        """What replaces the layer."""
        return {
            "type": "Chain",
            "form": self.name,
            "layers": tuple(layer.spec for layer in self.layers(geometry, rank)),
        }

    def fit(self, rank: Any, module: nn.Module, data: Data, init: Init) -> float:
        """Find the weights of what replaces a layer.

        Args:
            rank: the size.
            module: what replaces it, made from `spec`; its weights are set.
            data: the layer, and what it sees and should give.
            init: where the weights come from.

        Returns:
            The output error that is left, relative to the energy of the layer's outputs.
        """
        layer = data.layer
        objective = data.objective(init)
        if init == "random":
            factors = self.fresh(layer.geometry, module)
            error = objective.error(self.compose(layer.geometry, factors).flatten(2))
        else:
            factors, error = approximate(self, layer.geometry, layer.weight, rank, objective)
        offset = objective.offset(self.compose(layer.geometry, factors).flatten(2))
        self.fill(layer.geometry, module, factors, data.correct(offset))
        return error

    def fresh(self, geometry: Geometry, module: nn.Module) -> Factors:
        """The factors of new layers that know nothing of the old one."""
        return reset(module)

    def fill(self, geometry: Geometry, module: nn.Module, factors: Factors, bias: Tensor | None) -> None:
        """Set the weights of what replaces the layer."""
        parts = [part for part in module.modules() if Geometry.of(part) is not None]
        with torch.no_grad():
            for part, factor in zip(parts, factors, strict=True):
                weight_of(part).copy_(cast(Geometry, Geometry.of(part)).native(factor))
            if bias is not None:
                cast(Tensor, parts[-1].bias).copy_(bias)


def reset(module: nn.Module) -> Factors:
    """Give the layers of a module the weights that torch gives new ones, always the same; return them as factors."""
    factors = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in module.modules():
            geometry = Geometry.of(part)
            if geometry is not None:
                weight = weight_of(part)
                drawn = nn.init.kaiming_normal_(torch.empty(weight.shape), nonlinearity="linear")
                factors.append(geometry.canonical(drawn.to(weight.device).double()))
    return tuple(factors)


def approximate(
    form: Form, geometry: Geometry, weight: Tensor, rank: Any, objective: Objective, sweeps: int = SWEEPS
) -> tuple[Factors, float]:
    """The factors of least output error, from the trained weight and moments of the data.

    Two beginnings are tried, in the space of weights and in that of outputs, and each is brought down; so the error is
    never above that of the same form found from the weight alone.

    Args:
        form: how the layer is written.
        geometry: the layer.
        weight: its trained weight, canonical.
        rank: the size.
        objective: what the outputs are to be.
        sweeps: rounds over the factors.

    Returns:
        The factors, and the relative output error.
    """
    weight = weight.detach().double()
    plain = form.start(geometry, weight, rank, None)
    if objective.second is None:
        return plain, objective.error(form.compose(geometry, plain).flatten(2))
    best = _descend(form, geometry, plain, objective, 1)
    target = objective.solution(weight.flatten(2)).view_as(weight)
    informed = _descend(form, geometry, form.start(geometry, target, rank, form.metric(objective)), objective, sweeps)
    return min(best, informed, key=lambda found: found[1])


def _descend(
    form: Form, geometry: Geometry, factors: Factors, objective: Objective, sweeps: int
) -> tuple[Factors, float]:
    best = factors, objective.error(form.compose(geometry, factors).flatten(2))
    for _ in range(sweeps):
        before = best[1]
        for place in reversed(range(len(factors))):
            if not factors[place].is_floating_point():
                continue  # a choice (an order of the outputs), not a weight
            last = place == len(factors) - 1
            step = _solve_outputs if last and form.solves_outputs else _conjugate_gradients
            factors = step(form, geometry, best[0], place, objective)
            error = objective.error(form.compose(geometry, factors).flatten(2))
            if error < best[1]:
                best = factors, error
        if before - best[1] < 1e-3 * before:
            break
    return best


def _solve_outputs(form: Form, geometry: Geometry, factors: Factors, place: int, objective: Objective) -> Factors:
    """The last factor, exactly: least squares on what the others make of the patches."""
    last = factors[place]
    blocks, size = last.shape[0], last[0, 0].numel()  # it may have more groups than the layer
    unit = torch.eye(size, dtype=last.dtype, device=last.device).view(1, size, *last.shape[2:])
    basis = form.compose(geometry, (*factors[:place], unit.expand(blocks, *unit.shape[1:]))).reshape(blocks, size, -1)
    normal = objective.apply(basis) @ basis.transpose(1, 2)
    ridge = _relative_ridge(objective) * normal.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
    prior = last.flatten(2)
    right = objective.cross.reshape(blocks, -1, basis.shape[2]) @ basis.transpose(1, 2) + ridge * prior
    normal = normal + ridge * torch.eye(size, dtype=last.dtype, device=last.device)
    solution = torch.linalg.solve(normal, right.transpose(1, 2)).transpose(1, 2)
    return (*factors[:place], solution.view_as(last))


def _conjugate_gradients(form: Form, geometry: Geometry, factors: Factors, place: int, objective: Objective) -> Factors:
    """One factor, the others fixed: conjugate gradients on the normal equations of its step."""

    def weight(factor: Tensor) -> Tensor:
        return form.compose(geometry, (*factors[:place], factor, *factors[place + 1 :])).flatten(2)

    now, pull = cast(tuple[Tensor, Any], vjp(weight, factors[place]))

    def normal(step: Tensor) -> Tensor:
        product: Tensor = pull(objective.apply(weight(step)))[0]
        return product

    residual: Tensor = pull(objective.cross - objective.apply(now))[0]
    direction, step = residual.clone(), torch.zeros_like(residual)
    square = first = residual.square().sum()
    if not square > 0:
        return factors
    ridge = _relative_ridge(objective) * float((normal(direction) * direction).sum() / square)
    for _ in range(form.steps):
        image = normal(direction) + ridge * direction
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        length = square / curvature
        step = step + length * direction
        residual = residual - length * image
        square, before = residual.square().sum(), square
        if square < 1e-12 * first:
            break
        direction = residual + square / before * direction
    return (*factors[:place], factors[place] + step, *factors[place + 1 :])


def _relative_ridge(objective: Objective) -> float:
    if objective.second is None:
        return 1e-9
    return objective.ridge / float(objective.second.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300))


def whitening(second: Tensor) -> Tensor:
    """L with L L^T = the moments, [G, d, d], lifted a little where they are singular."""
    size = second.shape[-1]
    unit = torch.eye(size, dtype=second.dtype, device=second.device)
    lift = 1e-6 * second.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300)
    root: Tensor = torch.linalg.cholesky(second + lift * unit)
    return root


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of [G, a, b], the most important first, and their squared singular values.

    By the eigenvectors of the Gram matrix: many times faster than a singular value decomposition, and orthonormal.
    """
    values, vectors = torch.linalg.eigh(matrix @ matrix.transpose(1, 2))
    return vectors.flip(-1), values.flip(-1).clamp_min(0.0)
