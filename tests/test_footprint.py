"""Footprints against numbers worked out by hand, and the traces that measuring must not leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_compress.artifact import artifact_bytes, save_compressed
from lightning_compress.calls import Call, as_calls
from lightning_compress.edits import Keep, apply_edits, skeleton
from lightning_compress.footprint import Footprint, measure
from lightning_compress.latency import Latency, Spread, compare_latency


class Shared(nn.Module):
    """One layer, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x)))


class Functional(nn.Module):
    """A raw parameter, used twice: to encode and, transposed, to decode."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(5, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(F.conv2d(x, self.filters)), self.filters)


class Attention(nn.Module):
    """Products of activations with each other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


IMAGE = torch.randn(3, 4, 8, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(6, 7), torch.randn(3, 6), 6 * 7),
    "linear over positions": (lambda: nn.Linear(6, 7), torch.randn(3, 5, 6), 5 * 6 * 7),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE, 8 * 8 * 6 * 4 * 9),
    "strided, no padding": (lambda: nn.Conv2d(4, 6, 3, stride=2), IMAGE, 3 * 3 * 6 * 4 * 9),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), IMAGE, 4 * 4 * 6 * 4 * 9),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE, 6 * 6 * 6 * 2 * 9),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGE, 6 * 6 * 4 * 9),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGE, 8 * 8 * 4 * 6 * 9),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE, 8 * 8 * 4 * 3 * 9),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), 7 * 6 * 4 * 3),
    "shared": (Shared, torch.randn(3, 6), 3 * 6 * 6),
    "functional": (Functional, torch.randn(3, 2, 8, 8), 2 * 6 * 6 * 5 * 2 * 9),
    "attention": (Attention, torch.randn(3, 5, 4), 2 * 5 * 5 * 4),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.randn(3, 4, 8),
        4 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 4 * 4 * 8,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_macs_are_those_worked_out_by_hand(case: str) -> None:
    make, inputs, macs = CASES[case]
    footprint = measure(make(), inputs)
    assert footprint.macs == macs
    assert sum(footprint.layers.values()) == macs


@pytest.mark.parametrize("case", CASES)
def test_skeletons_measure_the_same_without_values(case: str) -> None:
    make, inputs, macs = CASES[case]
    model = make()
    real = measure(model, inputs)
    mode = FakeTensorMode()
    for bones in (skeleton(model, mode.from_tensor), skeleton(model)):
        fake = measure(bones, inputs)
        assert fake.macs == macs
        assert (fake.params, dict(fake.layers)) == (real.params, dict(real.layers))
        assert fake.bytes == artifact_bytes(model, coded=False)
        assert fake.nonzero == (None if any(True for _ in model.parameters()) else 0)


def test_macs_do_not_depend_on_the_batch_given() -> None:
    conv = nn.Conv2d(4, 6, 3)
    assert measure(conv, IMAGE).macs == measure(conv, IMAGE[:1]).macs == measure(conv, IMAGE.repeat(7, 1, 1, 1)).macs


def test_layers_say_where_operations_ran() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1))
            self.raw = nn.Parameter(torch.randn(5, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.block(x), self.raw)

    assert measure(Net(), IMAGE).layers == {"block.0": 64 * 8, "block.2": 64 * 6, "": 64 * 15}


def test_calls_of_submodules_are_summed() -> None:
    net = nn.ModuleDict({"encoder": nn.Linear(4, 3), "decoder": nn.Linear(3, 4)})
    calls = (Call((torch.randn(2, 4),), path="encoder"), Call((torch.randn(2, 3),), path="decoder"))
    footprint = measure(net, calls)
    assert footprint.macs == 24
    assert set(footprint.layers) == {"encoder", "decoder"}


def test_uncounted_names_arithmetic_and_only_arithmetic() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, x.flip(1)], 1).chunk(2, 1)[0].contiguous().roll(1, 2)
            y = F.pixel_unshuffle(F.pad(self.norm(y).relu_(), (1, 1, 1, 1)), 2)[:, :4]
            return self.lstm(y.flatten(2).permute(2, 0, 1))[0]

    uncounted = measure(Net(), IMAGE).uncounted
    assert set(uncounted) == {"aten.native_batch_norm", "aten.relu", "aten.mkldnn_rnn_layer"} or (
        set(uncounted) >= {"aten.native_batch_norm", "aten.relu", "aten.sigmoid"}  # where there is no oneDNN
    )
    assert uncounted["aten.relu"] == 4 * 8 * 8


def test_params_count_ties_once_and_zeros_apart() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[0] = 0
    footprint = measure(net, torch.randn(2, 4))
    assert (footprint.params, footprint.nonzero, footprint.sparsity) == (16, 12, 0.25)


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5))
    sizes = {"3.weight": (5, 216), "3.bias": (5,)}
    cut = Keep({name: {0: (0, 3)} for name in sizes}, sizes, {"3": {"out_features": (5, 2)}})
    for edits in ([], [cut]):
        apply_edits(net, edits)
        save_compressed(net, tmp_path / "net")
        size = (tmp_path / "net").stat().st_size
        assert measure(net, IMAGE).bytes == size
        assert measure(skeleton(net), IMAGE).bytes == size
    save_compressed(net.half(), tmp_path / "half")
    assert size - (tmp_path / "half").stat().st_size >= 2 * sum(p.numel() for p in net.parameters())


def test_peak_memory_of_a_chain_is_parameters_and_the_two_widest_neighbours() -> None:
    net = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 2000), nn.Linear(2000, 5))
    parameters = sum(p.numel() for p in net.parameters())
    # The recorded input is held by whoever asks; 1000 and 2000 values are alive while the second layer runs.
    assert measure(net, torch.randn(4, 10)).peak_memory == 4 * (parameters + 10 + 1000 + 2000)


def test_peak_memory_sees_what_is_kept_alive() -> None:
    class Dense(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = [x + i for i in range(8)]
            return torch.stack(kept).sum(0)

    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for i in range(8):
                x = x + i
            return x

    x = torch.randn(1, 1000)
    assert measure(Chain(), x).peak_memory == 4 * 1000 * 3
    assert measure(Dense(), x).peak_memory == 4 * 1000 * (1 + 8 + 8 + 1)


class Restless(nn.Module):
    """Changes buffers and draws random numbers even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.BatchNorm1d(4).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x[0].detach() * 2
        return F.dropout(self.frozen(self.norm(x)), 0.5, training=True)


@pytest.mark.parametrize("latency", [False, True])
def test_measuring_leaves_no_trace(latency: bool) -> None:
    net = Restless().train()
    net.frozen.eval()
    hooks = []
    handle = net.norm.register_forward_hook(lambda *_: hooks.append(1))
    buffers = dict(net.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    modes = {name: module.training for name, module in net.named_modules()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    inputs = torch.randn(6, 4)
    original = inputs.clone()
    torch.set_rng_state(state)
    fast = torch.backends.mha.get_fastpath_enabled()
    measure(net, inputs, latency=latency, batch_sizes=(2,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, original)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert dict(net.named_buffers()).keys() == buffers.keys()
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, before[name])
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert len(net._forward_pre_hooks) == 0
    assert len(net.norm._forward_hooks) == 1
    handle.remove()


def test_an_error_in_the_network_leaves_no_trace_either() -> None:
    class Broken(Restless):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("broken")

    net = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        measure(net, torch.randn(2, 4))
    assert net.training
    assert int(net.calls) == 0
    assert not net._forward_hooks


def test_footprints_survive_json() -> None:
    footprint = measure(nn.Linear(3, 2), torch.randn(2, 3), latency=True, batch_sizes=(1, 2))
    assert Footprint.from_json(footprint.to_json()) == footprint


def test_latency_takes_the_sides_in_turn_and_restores_threads() -> None:
    order: list[tuple[str, int, int]] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.weight = nn.Parameter(torch.zeros(400, 400))

        def forward(self, x: Tensor) -> Tensor:
            order.append((self.name, x.shape[0], torch.get_num_threads()))
            for _ in range(20):  # long enough that one run is a block
                x = x @ self.weight
            return x

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        calls = as_calls(torch.zeros(3, 400))
        sides: dict[str, tuple[nn.Module, Any]] = {"dense": (Noted("dense"), calls), "small": (Noted("small"), calls)}
        times = compare_latency(sides, (1, 32), repeats=6, warmup=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {size for _, size, _ in order} == {1, 32}
    assert {n for _, _, n in order} == {1, 2}
    timed = [name for name, size, n in order if size == 32 and n == 2]
    runs = [name for i, name in enumerate(timed) if i == 0 or timed[i - 1] != name]
    assert len(runs) >= 6  # not all of one side and then all of the other
    for name in sides:
        for size in (1, 32):
            latency = times[name][size]
            assert (latency.batch_size, latency.threads, latency.device, latency.runtime) == (size, 2, "cpu", "eager")
            assert 5 <= latency.repeats <= 6
            for spread in (latency.wall, latency.cpu):
                assert 0 < spread.low <= spread.median <= spread.high


def test_latency_with_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are those of one batch, in milliseconds, whatever the number of runs in a block."""
    now = [0.0]

    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: Tensor) -> Tensor:
            now[0] += self.seconds
            return x

    monkeypatch.setattr("lightning_compress.latency.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("lightning_compress.latency.time.process_time", lambda: now[0] / 2)
    calls = as_calls(torch.zeros(1, 1))
    times = compare_latency({"a": (Slow(0.0001), calls), "b": (Slow(0.5), calls)}, (1,), repeats=7)
    for name, seconds in (("a", 0.0001), ("b", 0.5)):
        latency = times[name][1]
        assert latency.wall.median == pytest.approx(1000 * seconds)
        assert latency.cpu.high == pytest.approx(500 * seconds)


@pytest.mark.parametrize("bad", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"repeats": 0}, {"warmup": 0}])
def test_latency_refuses_what_cannot_be_timed(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compare_latency({"a": (nn.Linear(1, 1), as_calls(torch.zeros(1, 1)))}, **bad)


def test_latency_survives_json() -> None:
    latency = Latency(Spread(1.0, 0.5, 2.0), Spread(1.0, 0.9, 1.1), 1, 5, 2, None, "cpu")
    assert Latency.from_json(latency.to_json()) == latency


def test_observers_see_nothing_of_it_and_are_not_copied() -> None:
    class Trainerlike:
        """Something big that a hook belongs to."""

        seen = 0

        def look(self, *_: object) -> None:
            self.seen += 1

        def __deepcopy__(self, memo: dict[int, Any]) -> Trainerlike:
            raise AssertionError("copied")

    watcher, net = Trainerlike(), nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(watcher.look)
    net[0].register_full_backward_hook(watcher.look)
    measure(net, torch.randn(1, 2), latency=True, batch_sizes=(1,))
    assert watcher.seen == 0
    net(torch.randn(1, 2))
    assert watcher.seen == 1
    with pytest.raises(AssertionError, match="copied"):
        copy.deepcopy(net)
