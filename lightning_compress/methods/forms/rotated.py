"""One kernel in its four rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors
from lightning_compress.methods.forms.matching import assign, gather_groups
from lightning_compress.methods.forms.ordered import Ordered, predict
from lightning_compress.methods.geometry import Geometry

__all__ = ["Rotated"]


@dataclass(frozen=True)
class Rotated(Ordered):
    """Filters in fours: one kernel in its four rotations by 90 degrees. Fewer weights, as many multiply-accumulates.

    The weight sharing of p4 group convolutions (Cohen and Welling 2016, 'Group equivariant convolutional networks',
    arXiv 1602.07576), in the filters of one layer at a time: its inputs need not be any group's. Which outputs share a
    kernel, and which rotation each gets, is assigned by the Hungarian method, by turns with the kernels, which are
    least squares in the outputs.

    Example:
        >>> [layer["type"] for layer in Rotated().spec(Geometry.of(nn.Conv2d(8, 16, 3)), 4)["layers"]]
        ['Rotated', 'Reorder']
    """

    name: ClassVar[str] = "rotated"
    ROUNDS: ClassVar[int] = 20
    TURNS: ClassVar[int] = layers.Rotated.ROTATIONS

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if len(geometry.kernel) != 2 or geometry.kernel[0] != geometry.kernel[1] or geometry.kernel[0] < 2:
            return "has no square kernel of at least 2 x 2"
        if geometry.transposed or geometry.padding_mode != "zeros":
            return "is transposed or pads with something else than zeros"
        if geometry.padding == "same" and geometry.kernel[0] % 2 == 0:
            return "pads its two sides differently"
        return "has outputs that do not come in fours" if geometry.matrix[1] % self.TURNS else None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. None of them is plain."""
        return ()

    def body(self, geometry: Geometry, rank: int) -> tuple[Spec, ...]:
        """See `Ordered`."""
        plain = dict(geometry.spec)
        del plain["padding_mode"]
        if isinstance(geometry.padding, str):
            plain["padding"] = tuple(d * (k // 2) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
        return ({**plain, "type": "Rotated"},)

    def default_order(self, geometry: Geometry) -> Tensor:
        """See `Ordered`."""
        return torch.arange(geometry.outputs)

    def fresh(self, geometry: Geometry, module: nn.Module) -> Factors:
        """See `Form`."""
        kernels = cast(Tensor, cast(nn.Sequential, module)[0].weight)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            new = nn.init.kaiming_normal_(torch.empty(kernels.shape), nonlinearity="linear")
        new = new.to(kernels.device).double().unflatten(0, (geometry.groups, -1))
        return self.default_order(geometry).to(kernels.device), new

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`. The size is the number of kernels."""
        return [predict(self, geometry, weight, geometry.outputs // self.TURNS, second)]

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`."""
        outputs = geometry.matrix[1]
        found = [self._share(block, None if second is None else second[g]) for g, block in enumerate(weight)]
        order = torch.cat([slots + g * outputs for g, (slots, _) in enumerate(found)])
        return order, torch.stack([kernels for _, kernels in found])

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        order, kernels = factors
        filters = layers.Rotated.rotate(kernels.flatten(0, 1), geometry.groups)
        weight: Tensor = filters[order].unflatten(0, (geometry.groups, -1))
        return weight

    def set_kernels(self, geometry: Geometry, module: nn.Sequential, kernels: Factors) -> None:
        """See `Ordered`."""
        cast(Tensor, module[0].weight).copy_(kernels[0].flatten(0, 1))

    def set_biases(self, module: nn.Sequential, factors: Factors, bias: Tensor) -> None:
        """See `Ordered`."""
        cast(Tensor, module[0].bias).copy_(bias)

    def _share(self, weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slot of each output of one group, and kernels; slot t * kernels + j is the j-th kernel turned t times."""
        outputs, shape, size = len(weight), weight.shape[1:], weight[0].numel()
        index = torch.arange(size, device=weight.device).view(shape)
        turned = torch.stack([torch.rot90(index, turn, (-2, -1)).flatten() for turn in range(self.TURNS)])
        back = torch.stack([torch.rot90(index, -turn, (-2, -1)).flatten() for turn in range(self.TURNS)])
        matrix = weight.flatten(1)
        metric = torch.eye(size, dtype=weight.dtype, device=weight.device) if second is None else second
        image = matrix @ metric
        # The kernels of all fours have the same normal matrix: the metric, averaged over rotations.
        normal = torch.stack([metric[b][:, b] for b in back]).sum(0)
        lift = 1e-9 * normal.diagonal().mean().clamp_min(1e-300)
        factor = torch.linalg.cholesky(normal + lift * torch.eye(size, dtype=weight.dtype, device=weight.device))
        energy = (image * matrix).sum(1)
        apart = [energy + ((r @ metric) * r).sum(1)[:, None] - 2 * r @ image.T for r in (matrix[:, t] for t in turned)]
        kernels = matrix[gather_groups(torch.stack(apart).amin(0).clamp_min(0.0), self.TURNS)[:, 0]]
        best, slots = -torch.inf, torch.arange(outputs, device=weight.device)
        for _ in range(self.ROUNDS):
            filters = torch.cat([kernels[:, t] for t in turned])
            slots = assign(-image @ filters.T)
            holders = slots.argsort().view(self.TURNS, -1)
            right = torch.stack([image[held][:, b] for held, b in zip(holders, back, strict=True)]).sum(0)
            kernels = torch.cholesky_solve(right.T, factor).T
            explained = float((right * kernels).sum())
            if explained <= best + 1e-9 * abs(best):
                break
            best = explained
        return slots, kernels.view(-1, *shape)
