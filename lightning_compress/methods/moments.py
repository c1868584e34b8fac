"""Moments: all that a least-squares problem over calibration data needs to keep of the data.

With patches p and wanted outputs y of a layer, how far the outputs of a weight W are from the wanted ones is a
quadratic in W whose coefficients are the second moments of p and the cross moments with y. They are summed in double
precision, chunk by chunk; no activation is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.methods.geometry import Geometry
from lightning_compress.wording import NOT_FINITE

__all__ = ["Moments", "Objective"]

RIDGE = 1e-5
"""Tikhonov term, relative to the mean second moment; scaled up where there are few samples for the unknowns."""


@dataclass(frozen=True)
class Objective:
    """The squared output error of a layer's weight, over the energy of the wanted outputs.

    Weights are matrices here, [G, O, d], d the rows of a patch.

    Attributes:
        second: second moments of the patches, [G, d, d]; None: the identity, which compares weights themselves.
        cross: moments of the wanted outputs with the patches, [G, O, d].
        energy: mean square of the wanted outputs, summed over channels.
        mean: of the patches, [G, d], and of the wanted outputs, [G, O], where a constant takes up the means.
        ridge: Tikhonov term for unknowns in the space of the patches.
    """

    second: Tensor | None
    cross: Tensor
    energy: float
    mean: tuple[Tensor, Tensor] | None = None
    ridge: float = 0.0

    @classmethod
    def of_weight(cls, weight: Tensor) -> Objective:
        """Distance to a trained weight, whatever the data."""
        matrix = weight.detach().double().flatten(2)
        return cls(None, matrix, float(matrix.square().sum()))

    def error(self, matrix: Tensor) -> float:
        """The mean squared error of a weight, relative to the energy of the wanted outputs."""
        if not self.energy:
            return 0.0
        quadratic = (self.apply(matrix) * matrix).sum() - 2 * (self.cross * matrix).sum()
        return max(0.0, float(quadratic) / self.energy + 1.0)

    def apply(self, matrix: Tensor) -> Tensor:
        """A weight times the second moments."""
        return matrix if self.second is None else matrix @ self.second

    def offset(self, matrix: Tensor) -> Tensor | None:
        """The constant that brings the mean output of a weight to the wanted one, [G * O]; None: there is none."""
        if self.mean is None:
            return None
        patch, output = self.mean
        return (output - (matrix @ patch[..., None])[..., 0]).flatten()

    def solution(self, prior: Tensor) -> Tensor:
        """The weight of least error; what the data does not determine stays near `prior`."""
        if self.second is None:
            return self.cross
        size = self.second.shape[-1]
        normal = self.second + self.ridge * torch.eye(size, dtype=self.second.dtype, device=self.second.device)
        factor = torch.linalg.cholesky(normal)
        return torch.cholesky_solve((self.cross + self.ridge * prior).transpose(1, 2), factor).transpose(1, 2)


class Moments:
    """Sums over calibration data for one layer.

    Args:
        geometry: the layer.
        cross: keep moments with the wanted outputs too. Without, they are taken to be those of the layer's own weight.

    Example:
        >>> geometry = Geometry(inputs=3, outputs=2, bias=False)
        >>> moments, x, weight = Moments(geometry), torch.randn(50, 3), torch.randn(2, 3)
        >>> moments.add(x, x @ weight.T)
        >>> round(moments.objective(centred=False).error(weight[None].double()), 6)
        0.0
    """

    def __init__(self, geometry: Geometry, cross: bool = True) -> None:
        self.geometry, self.count = geometry, 0
        self._cross = cross
        self._sums: tuple[Tensor, ...] | None = None

    @property
    def bytes(self) -> int:
        """What the sums take."""
        groups, outputs, rows = self.geometry.matrix
        return 8 * groups * rows * (rows + (outputs if self._cross else 0))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs of the layer, and the outputs that it should have on them."""
        with torch.no_grad():
            for patches, outputs in self.geometry.columns(x.detach(), y.detach()):
                self.count += patches.shape[2]
                turned = patches.transpose(1, 2)
                new = [patches @ turned, patches.sum(2), outputs.sum(2), outputs.square().sum(2)]
                if self._cross:
                    new.append(outputs @ turned)
                if self._sums is None:
                    self._sums = tuple(new)
                else:
                    for total, part in zip(self._sums, new, strict=True):
                        total += part

    def patches(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Second moments of the patches, [G, d, d], about their mean if `centred`; and their mean, [G, d].

        Raises:
            ValueError: no data, or values that are not finite.
        """
        second, patch, _, square = self._means()
        if not (torch.isfinite(second).all() and torch.isfinite(square).all()):
            raise ValueError(NOT_FINITE)
        return second - patch[..., None] * patch[..., None, :] if centred else second, patch

    def objective(self, centred: bool, weight: Tensor | None = None) -> Objective:
        """The least-squares problem.

        Args:
            centred: a constant (the layer's bias, a norm behind it) takes up the means.
            weight: the layer's own weight, [G, O, d], where cross moments were not kept.

        Raises:
            ValueError: no data, or values that are not finite.
        """
        second, patch = self.patches(centred)
        _, _, output, square = self._means()
        energy = square.sum() - (output.square().sum() if centred else 0.0)
        if self._cross:
            assert self._sums is not None
            cross = self._sums[4] / self.count
            cross = cross - output[..., None] * patch[..., None, :] if centred else cross
        else:
            assert weight is not None
            cross = weight.double() @ second
        mean = (patch, output) if centred else None
        rows = second.shape[-1]
        scale = float(second.diagonal(dim1=1, dim2=2).mean())
        ridge = RIDGE * scale * (1 + 100 * rows / self.count)
        return Objective(second, cross, max(float(energy), 0.0), mean, max(ridge, torch.finfo(torch.float64).tiny))

    def _means(self) -> tuple[Tensor, ...]:
        if self._sums is None:
            raise ValueError("no calibration data reached the layer: is it used at all? Else name it in `exclude`")
        return tuple(total / self.count for total in self._sums[:4])
