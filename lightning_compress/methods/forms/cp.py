"""The low-rank form of four factors: a kernel as a sum of separable ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.methods.approximation import Candidate, Factors, leading
from lightning_compress.methods.forms.low_rank import Decomposition
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Objective

__all__ = ["CP"]


@dataclass(frozen=True)
class CP(Decomposition):
    """Pointwise, k x 1 and 1 x k depthwise, pointwise: the kernel as a sum of `rank` separable ones (CP, PARAFAC).

    Lebedev et al. 2014, 'Speeding-up convolutional neural networks using fine-tuned CP-decomposition'
    (arXiv 1412.6553). Terms that grow while they cancel each other, the degeneracy that makes it hard to train (Phan et
    al. 2020, 'Stable low-rank tensor decomposition', arXiv 2008.05441), are held down: factors are found by alternating
    least squares with a Tikhonov term and all four of a term have the same norm. Cheap on paper: four small layers.

    Args:
        round_to: ranks above this are multiples of it.

    Example:
        >>> from torch import nn
        >>> form, geometry = CP(), Geometry.of(nn.Conv2d(8, 16, 3))
        >>> [(layer.outputs, layer.kernel) for layer in form.layers(geometry, 4)]
        [(4, (1, 1)), (4, (3, 1)), (4, (1, 3)), (16, (1, 1))]
    """

    name: ClassVar[str] = "cp"
    SWEEPS: ClassVar[int] = 12
    RIDGE: ClassVar[float] = 1e-3

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if len(geometry.kernel) != 2 or min(geometry.kernel) < 2:
            return "its kernel has not two sides of at least 2"
        return "has one channel for each group" if geometry.shape[2] == 1 else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`."""
        middle = rank * geometry.groups
        return (
            geometry.point(geometry.inputs, middle, geometry.groups),
            geometry.like(middle, middle, middle, axes=(0,)),
            geometry.like(middle, middle, middle, axes=(1,)),
            geometry.point(middle, geometry.outputs, geometry.groups, geometry.bias),
        )

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        most = min(math.prod(weight.shape[1:]) // max(weight.shape[1:]), 2 * max(weight.shape[1:3]))
        grid = {self.rounded(max(1, round(most * 2 ** (-step / 2))), most) for step in range(12)}
        ranks = sorted(grid, reverse=True)
        objective = Objective.of_weight(weight) if second is None else _own(weight, second)
        found = []
        for rank in ranks:
            factors = self.start(geometry, weight, rank, None)
            error = objective.error(self.compose(geometry, factors).flatten(2))
            found.append(Candidate(rank, min(1.0, error)))  # on data a bad start may lose more than there is
        return found

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """Alternating least squares in the space of weights; data comes in by what follows."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        sizes = (weight.shape[2], *weight.shape[3:], weight.shape[1])  # inputs, rows, columns, outputs
        tensor = weight.permute(0, 2, 3, 4, 1)
        parts = []
        for dim, size in enumerate(sizes):
            unfolded = tensor.movedim(dim + 1, 1).flatten(2)
            vectors = leading(unfolded)[0][..., : min(rank, size)]
            if rank > size:
                more = torch.randn(len(weight), size, rank - size, generator=generator, dtype=torch.float64)
                vectors = torch.cat([vectors, more.to(weight.device) / math.sqrt(size)], 2)
            parts.append(vectors)
        energy = float(weight.square().sum()) / max(len(weight), 1)
        for sweep in range(self.SWEEPS):
            for dim in range(4):
                others = [part for place, part in enumerate(parts) if place != dim]
                gram = math.prod(
                    (part.transpose(1, 2) @ part for part in others[1:]), start=others[0].transpose(1, 2) @ others[0]
                )
                ridge = self.RIDGE * 0.5**sweep * gram.diagonal(dim1=1, dim2=2).mean() + 1e-12 * energy
                gram = gram + ridge * torch.eye(rank, dtype=gram.dtype, device=gram.device)
                letters = "cijo"
                inputs = ",".join(f"g{letter}r" for place, letter in enumerate(letters) if place != dim)
                right = torch.einsum(f"gcijo,{inputs}->g{letters[dim]}r", tensor, *others)
                parts[dim] = torch.linalg.solve(gram, right.transpose(1, 2)).transpose(1, 2)
            norms = [part.norm(dim=1, keepdim=True).clamp_min(1e-150) for part in parts]
            common = (norms[0] * norms[1] * norms[2] * norms[3]) ** 0.25
            parts = [part / norm * common for part, norm in zip(parts, norms, strict=True)]
        channels, rows, columns, outputs = parts
        flat = len(weight) * rank
        return (
            channels.transpose(1, 2)[..., None, None],
            rows.transpose(1, 2).reshape(flat, 1, 1, -1, 1),
            columns.transpose(1, 2).reshape(flat, 1, 1, 1, -1),
            outputs[..., None, None],
        )

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        channels, rows, columns, outputs = factors
        shape = channels.shape[:2]
        high, wide = rows.reshape(*shape, -1), columns.reshape(*shape, -1)
        return torch.einsum("grc,gri,grj,gor->gocij", channels.flatten(2), high, wide, outputs.flatten(2))


def _own(weight: Tensor, second: Tensor) -> Objective:
    """The objective whose wanted outputs are those of the weight itself."""
    matrix = weight.flatten(2)
    cross = matrix @ second
    return Objective(second, cross, float((cross * matrix).sum()))
