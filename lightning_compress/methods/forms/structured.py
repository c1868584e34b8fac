"""What forms of structured weights have in common: a layer in the place of one, its weight made of fewer numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.edits import Spec
from lightning_compress.methods.approximation import Candidate, Factors, Form
from lightning_compress.methods.forms.ordered import predict
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Objective

__all__ = ["Structured", "lifted"]


class Structured(Form):
    """A form with one factor: the parameter of the layer that takes the place, of linear layers and convolutions."""

    solves_outputs: ClassVar[bool] = False
    kind: ClassVar[str]
    """Type of the layer, as specifications name it."""

    @abstractmethod
    def rank(self, geometry: Geometry) -> int:
        """The size: how many weights the layer has left."""

    @abstractmethod
    def options(self, geometry: Geometry) -> Mapping[str, Any]:
        """The arguments of the layer beside its sizes."""

    def metric(self, objective: Objective) -> Tensor | None:
        """See `Form`: with the ridge. `start` is exact, and would follow few samples wherever they lead."""
        if objective.second is None:
            return None
        size = objective.second.shape[-1]
        unit = torch.eye(size, dtype=objective.second.dtype, device=objective.second.device)
        return objective.second + objective.ridge * unit

    def refuses(self, geometry: Geometry) -> str | None:
        """See `Form`."""
        if geometry.transposed or geometry.padding_mode != "zeros":
            return "is transposed or pads with something else than zeros"
        return None

    def layers(self, geometry: Geometry, rank: int) -> Sequence[Geometry]:
        """See `Form`. None of them is plain."""
        return ()

    def spec(self, geometry: Geometry, rank: int) -> Spec:
        """See `Form`."""
        layer = {
            "type": self.kind,
            "in_channels": geometry.inputs,
            "out_channels": geometry.outputs,
            **self.options(geometry),
            "kernel_size": geometry.kernel,
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "groups": geometry.groups,
            "bias": geometry.bias,
        }
        return {"type": "Chain", "form": self.name, "layers": (layer,)}

    def candidates(self, geometry: Geometry, weight: Tensor, second: Tensor | None) -> list[Candidate]:
        """See `Form`."""
        return [predict(self, geometry, weight, self.rank(geometry), second)]

    def fresh(self, geometry: Geometry, module: nn.Module) -> Factors:
        """See `Form`."""
        weight = cast(Tensor, cast(nn.Sequential, module)[0].weight)
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (self.factor(geometry, drawn.to(weight.device) / math.sqrt(math.prod(geometry.shape[2:]))),)

    def fill(self, geometry: Geometry, module: nn.Module, factors: Factors, bias: Tensor | None) -> None:
        """See `Form`."""
        layer = cast(nn.Sequential, module)[0]
        weight = cast(Tensor, layer.weight)
        with torch.no_grad():
            weight.copy_(factors[0].view(weight.shape))
            if bias is not None:
                cast(Tensor, layer.bias).copy_(bias)

    def factor(self, geometry: Geometry, weight: Tensor) -> Tensor:
        """The factor that the layer's parameter is."""
        return weight


def lifted(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Normal matrices, [G, n, n], with a trace of the identity, and how much: a prior decides what they leave open."""
    lift = (1e-9 * normal.diagonal(dim1=1, dim2=2).mean()).clamp_min(1e-150)
    return normal + lift * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device), lift
