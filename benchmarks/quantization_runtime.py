"""How long quantized networks take, all sides in turns, each in its own runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distillation_runs import Place
from benchmarks.quantization_peers import PEERS
from benchmarks.quantization_runs import EAGER, OURS, RUNTIME, Recipe, Side, exported, make_side, quantized
from benchmarks.results import Found, Results, refusal
from benchmarks.training_free_runs import REFUSALS
from lightning_compress.calls import as_calls
from lightning_compress.latency import compare_latency

__all__ = ["BATCHES", "NETS", "RESNET18", "time_net", "timed", "timed_case"]

BATCHES = (1, 32)
RESNET18 = "resnet18"
NETS = ("vgg_small", "resnet20", "mobilenetv2_small", RESNET18)
LARGE = 224  # sides of ResNet-18's images
CALIBRATION = 32  # of ResNet-18: nothing is tested but its speed


class Timed(nn.Module):
    """A side, called as a network is."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Any:
        """Outputs of a batch."""
        return self.side.predict(x)


def timed_case(net: str, batch: int) -> str:
    """Of the JSON file."""
    return f"latency; {net}; batch {batch}"


def timed(results: Results, net: str, peers: Sequence[str]) -> bool:
    """Whether all sides of a network are there."""
    sides = (EAGER, RUNTIME, OURS[0], *peers)
    return all(results.has(timed_case(net, batch), side) for batch in BATCHES for side in sides)


def time_net(
    net: str, place: Place, recipe: Recipe, peers: Sequence[str], threads: int, repeats: int, seconds: float
) -> list[Found]:
    """Time all sides of a network against each other."""
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side] = {}
        for number, name in enumerate((EAGER, RUNTIME, OURS[0], *peers)):
            own = Path(folder, str(number))
            own.mkdir()
            try:
                sides[name] = (
                    _large(name, own, recipe, threads)
                    if net == RESNET18
                    else make_side(name, net, place, recipe, 0, own)
                )
            except REFUSALS as error:
                found += [Found(timed_case(net, batch), name, refusal(error)) for batch in BATCHES]
        channels, side = (3, LARGE) if net == RESNET18 else (1, 28)
        image = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
        calls = {name: (Timed(side), as_calls(image)) for name, side in sides.items()}
        for batch in BATCHES:
            for name, times in compare_latency(calls, (batch,), repeats=repeats, seconds=seconds * 6).items():
                latency = times[batch]
                metrics = {
                    "wall_ms": latency.wall.median,
                    "wall_ms_low": latency.wall.low,
                    "wall_ms_high": latency.wall.high,
                    "cpu_ms": latency.cpu.median,
                    "repeats": latency.repeats,
                    "threads": threads,
                    "load": latency.load,
                    **({} if sides[name].bytes is None else {"bytes": sides[name].bytes}),
                    **{k: v for k, v in sides[name].metrics.items() if k in ("layers", "layers_int8", "islands")},
                }
                found.append(Found(timed_case(net, batch), name, metrics))
    return found


def _large(name: str, folder: Path, recipe: Recipe, threads: int) -> Side:
    """ResNet-18 with weights as they are drawn, and statistics of some images."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net, x = resnet18(), torch.randn(CALIBRATION, 3, LARGE, LARGE)
    with torch.no_grad():
        net(x[:16])
    net.eval()
    if name == EAGER:
        return Side(net)
    if name == RUNTIME:
        return exported(net, x[:2], folder, threads)
    if name == OURS[0]:
        return exported(quantized(net, x, rounding="nearest"), x[:2], folder, threads)
    peer = PEERS[name].make(net, list(x.split(8)), folder, threads=threads)
    return Side(peer.predict, peer.bytes)
