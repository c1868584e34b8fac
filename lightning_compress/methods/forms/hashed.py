"""Hashed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.hashing import hash_codes
from lightning_compress.methods.approximation import Factors
from lightning_compress.methods.forms.ordered import check_count
from lightning_compress.methods.forms.structured import Structured, lifted
from lightning_compress.methods.geometry import Geometry

__all__ = ["Hashed"]

EXACT_VALUES, EXACT_PRODUCTS = 1024, 1 << 25
"""Values, and products of two entries of a patch over all outputs, up to which the normal matrix is made."""


@dataclass(frozen=True)
class Hashed(Structured):
    """Weights drawn from few values by a hash of where they are, with signs: `ratio` times fewer numbers.

    HashedNets (Chen, Wilson, Tyree, Weinberger and Chen 2015, 'Compressing neural networks with the hashing trick',
    arXiv 1504.04788), there trained from scratch. From a trained weight: each value is the mean of those that it stands
    for. On data: least squares in the outputs; exactly where there are few values, else by conjugate gradients.

    It makes files small, and no layer faster: as many multiply-accumulates as before, and the weight is put together
    in each call. Budgets of parameters and bytes can be met, those of multiply-accumulates and latency cannot.

    Args:
        ratio: weights for each value, at least 2.
        seed: of the hash, at least 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from torch import nn
        >>> form, geometry = Hashed(ratio=8), Geometry.of(nn.Linear(16, 10))
        >>> form.rank(geometry), form.spec(geometry, 20)["layers"][0]["values"]
        (20, 20)
    """

    name: ClassVar[str] = "hashed"
    kind: ClassVar[str] = "Hashed"
    steps: ClassVar[int] = 50
    ratio: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("ratio", self.ratio, 2)
        check_count("seed", self.seed, 0)
        if self.seed >= 1 << 64:
            raise ValueError(f"`seed` must be below 2 ** 64, got {self.seed}")

    def rank(self, geometry: Geometry) -> int:
        """See `Structured`. Rounded upwards."""
        return -(-geometry.weights // self.ratio)

    def options(self, geometry: Geometry) -> Mapping[str, Any]:
        """See `Structured`."""
        return {"values": self.rank(geometry), "seed": self.seed}

    def start(self, geometry: Geometry, weight: Tensor, rank: int, second: Tensor | None) -> Factors:
        """See `Form`. Of many values on data, those of the weight alone: what follows brings them down."""
        codes = self._codes(geometry, weight)
        count = self._gather(codes, torch.ones_like(weight), rank, signed=False)
        near = self._gather(codes, weight, rank) / count.clamp_min(1.0)
        groups, outputs, size = geometry.matrix
        if second is None or rank > EXACT_VALUES or groups * outputs * size**2 > EXACT_PRODUCTS:
            return (near,)
        sign, bucket = 1.0 - 2.0 * (codes >= rank), codes % rank
        normal = weight.new_zeros(rank * rank)
        for group, moments in enumerate(second):
            for places, signs in zip(bucket[group].flatten(1), sign[group].flatten(1).to(weight), strict=True):
                pairs = places[:, None] * rank + places
                normal.index_add_(0, pairs.flatten(), (signs[:, None] * moments * signs).flatten())
        right = self._gather(codes, (weight.flatten(2) @ second).view_as(weight), rank)
        matrix, lift = lifted(normal.view(1, rank, rank))
        return (torch.linalg.solve(matrix[0], right + lift * near),)

    def compose(self, geometry: Geometry, factors: Factors) -> Tensor:
        """See `Form`."""
        values = factors[0]
        codes = self._codes(geometry, values)
        return torch.cat([values, -values]).index_select(0, codes.flatten()).view(codes.shape)

    def _codes(self, geometry: Geometry, like: Tensor) -> Tensor:
        codes = hash_codes(geometry.weights, self.rank(geometry), self.seed)
        return torch.from_numpy(codes).to(like.device, torch.int64).view(geometry.shape)

    @staticmethod
    def _gather(codes: Tensor, weight: Tensor, values: int, signed: bool = True) -> Tensor:
        """Sums of weights, with their signs, over those that each value stands for."""
        both = weight.new_zeros(2 * values).index_add_(0, codes.flatten(), weight.flatten())
        own, negative = both.chunk(2)
        return own - negative if signed else own + negative
