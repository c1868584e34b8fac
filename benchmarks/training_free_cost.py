"""What calibration costs, in time and memory, on a ResNet-56: beside a training epoch and a forward pass.

The time of an epoch is estimated from timed steps: their median times the steps of 50,000 images. Memory is measured
in the same way for calibration and forward pass: the storages of tensors alive at the worst moment beyond those that
were there before, seen from torch's dispatcher.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_free_nets import CALIBRATION, CHUNK, channels_last, in_chunks, marked_table
from benchmarks.training_free_runs import Found, start
from lightning_compress import Budget
from lightning_compress.methods.factorization import factorize
from lightning_compress.zoo.feedforward import resnet56

__all__ = ["cost_case", "measure_cost", "print_costs"]

TIME_BOUND, MEMORY_BOUND = 1.0, 3.0
EPOCH_IMAGES, EPOCH_BATCH = 50_000, 128
STEPS = 5  # timed before and after the calibration
FORWARD_BATCH = CHUNK
SIZE, CHANNELS = 32, 3
MACS = 0.5
START = f"cost of calibration; ResNet-56, {SIZE} px; "
EPOCH, FORWARD = "one training epoch", f"forward pass, batch {FORWARD_BATCH}"


class PeakMemory(TorchDispatchMode):
    """The most bytes of new storages that are alive at once.

    Args:
        existing: tensors whose storages were there before.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            self._hold(tensor, new=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not (leaf.is_meta or isinstance(leaf, FakeTensor)):
                self._hold(leaf, new=True)
        return out

    def _hold(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._alive:
            return

        def release(_: Any) -> None:
            self._now -= size
            self._alive.pop(key)

        self._alive[key] = weakref.ref(storage, release)
        self._now += size
        self.peak = max(self.peak, self._now)


def cost_case(decomposition: str) -> str:
    """Of the JSON file."""
    return f"{START}{decomposition}; MACs {MACS:g}"


def measure_cost(decomposition: str) -> list[Found]:
    """Time and memory of one decomposition with `CALIBRATION` images, and of what it is compared with."""
    case = cost_case(decomposition)
    net, x = _network(), _inputs()
    before = _step_times()
    wall, cpu = time.perf_counter(), time.process_time()
    done = factorize(net, x[:2], Budget(macs=MACS), decomposition=decomposition, init="data", calibration=in_chunks(x))
    ours: dict[str, Any] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    steps = before + _step_times()
    ours |= {"replaced": len(done.errors), "images": CALIBRATION, **_memory("calibration", decomposition)}
    count = math.ceil(EPOCH_IMAGES / EPOCH_BATCH)
    wall, cpu = (count * statistics.median(times) for times in zip(*steps, strict=True))
    epoch = {"seconds": wall, "cpu_seconds": cpu, "steps": count, "timed_steps": len(steps)}
    forward = _memory("forward", decomposition)
    trained = {f"training_{name}": value for name, value in _memory("training", decomposition).items()}
    return [
        Found(case, f"ours {decomposition}; data", ours),
        Found(case, EPOCH, epoch),
        Found(case, FORWARD, {**forward, **trained}),
    ]


def _network() -> nn.Module:
    torch.manual_seed(0)
    net = channels_last(resnet56(CHANNELS, 10))
    with torch.no_grad():  # running statistics that belong to the weights, as a trained network has them
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        net(_inputs()[:CHUNK])
    return net.eval()


def _inputs() -> Tensor:
    """Images of noise that neighbouring pixels share, as those of photographs do."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(CALIBRATION, CHANNELS, SIZE // 4, SIZE // 4, generator=generator)
    smooth = F.interpolate(noise, (SIZE, SIZE), mode="bilinear")
    fine = torch.randn(smooth.shape, generator=generator)
    return (smooth + 0.2 * fine).contiguous(memory_format=torch.channels_last)


def _step_times() -> list[tuple[float, float]]:
    """Wall and processor time of steps of SGD; the data is there already, which is to the epoch's advantage."""
    net = channels_last(resnet56(CHANNELS, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    x, labels = _inputs()[:EPOCH_BATCH], torch.arange(EPOCH_BATCH) % 10
    times = []
    for _ in range(STEPS + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[1:]  # the first one warms up


def _memory(what: str, decomposition: str) -> dict[str, Any]:
    """In a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (torch.get_num_threads(),)) as pool:
        return pool.submit(_peak, what, decomposition).result()


def _peak(what: str, decomposition: str) -> dict[str, Any]:
    def calibrate(net: nn.Module, x: Tensor, macs: float) -> None:
        factorize(net, x[:2], Budget(macs=macs), decomposition=decomposition, init="data", calibration=in_chunks(x))

    small = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    calibrate(small, torch.randn(16, 3, 8, 8), 0.8)  # what is loaded once, and stays, is no cost of calibration
    net, x = _network(), _inputs()
    with torch.no_grad():
        net(x[:1])
    with PeakMemory([*net.parameters(), *net.buffers(), x]) as mode:
        if what == "calibration":
            calibrate(net, x, MACS)
        elif what == "forward":
            with torch.no_grad():
                net(x[:FORWARD_BATCH])
        else:
            net.train()
            F.cross_entropy(net(x[:FORWARD_BATCH]), torch.arange(FORWARD_BATCH) % 10).backward()
    return {"peak_bytes": mode.peak}


def print_costs(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console) -> None:
    """The table, and whether the ratios are within their bounds."""
    cases = [case for case in rows if case.startswith(START)]
    if not cases:
        return
    columns = ("decomposition", "CPU s", "epoch CPU s", "ratio", "wall s", "epoch wall s", "ratio")
    memory = ("peak MB", "forward MB", "ratio")
    table = marked_table(*columns, *memory)
    verdicts = []
    for case in cases:
        name, sides = case.removeprefix(START), rows[case]
        ours = next(metrics for side, metrics in sides.items() if side.startswith("ours "))
        cells, ratios = [], {}
        for unit, other, scale in (
            ("cpu_seconds", EPOCH, 1.0),
            ("seconds", EPOCH, 1.0),
            ("peak_bytes", FORWARD, 1e6),
        ):
            mine, theirs = ours[unit], sides[other][unit]
            ratios[unit] = mine / theirs
            cells += [f"{mine / scale:.1f}", f"{theirs / scale:.1f}", f"{ratios[unit]:.2f}"]
        table.add_row(name.replace("; ", ", "), *cells)
        for unit, bound in (("cpu_seconds", TIME_BOUND), ("peak_bytes", MEMORY_BOUND)):
            verdict = "passed" if ratios[unit] < bound else "MISSED"
            verdicts.append(f"- {name.split(';')[0]}, {unit}: {ratios[unit]:.2f}, aimed at below {bound:g}: {verdict}")
    console.print(f"**What calibration costs.** ResNet-56, {SIZE} px, {CALIBRATION} images, one thread.")
    console.print(table)
    for line in verdicts:
        console.print(line)
    console.print(
        f"The epoch is an estimate: the median of timed steps × {math.ceil(EPOCH_IMAGES / EPOCH_BATCH)}, the steps of "
        f"{EPOCH_IMAGES:,} images with batch {EPOCH_BATCH}. Forward: batch {FORWARD_BATCH}, without gradients. Peak: "
        "bytes of tensors beyond those that were there before.\n"
    )
