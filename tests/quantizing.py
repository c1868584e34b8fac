"""What the tests of quantization have in common: networks, images, and networks that were quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.methods.posttraining import quantize
from tests.networks import randomize


class Net(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        return self.run(self, *inputs, **named)


input_beside_what_is_made_of_it = pytest.mark.parametrize(
    ("run", "width"),
    [
        (lambda self, x: self.last(x + self.body(x)), 3),
        (lambda self, x: self.last(self.body(x) + x), 3),
        (lambda self, x: self.last(torch.cat([x, self.body(x)], 1)), 6),
        (lambda self, x: self.last(torch.cat([self.body(x), x], 1)), 6),
    ],
    ids=["first", "second", "joined first", "joined second"],
)


def net_of(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(make(), seed).eval()


def images(count: int = 32, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def quantized(make: Callable[[], nn.Module], **precision: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, inputs, and what it gave before."""
    net, x = net_of(make), images()
    before = net(x)
    quantize(net, x, **{"target": "vnni", "rounding": "nearest", **precision})
    return net, x, before
