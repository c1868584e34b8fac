"""Networks quantized after training: near what they were, whoever copies, compiles or interrupts them, and for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from lightning_compress.edits import history
from lightning_compress.methods.posttraining import quantize
from lightning_compress.methods.quantization import integers, quantized_weights
from tests.contract.nets import NETS, Residual
from tests.networks import AWKWARD, RandomNetwork, networks, randomize
from tests.quantizing import images, net_of, quantized

WITHOUT = ("Volume",)
"""Awkward networks all of whose layers are over volumes."""

few = settings(max_examples=12, suppress_health_check=list(HealthCheck))
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())


def floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def error(model: nn.Module, inputs: Any, wanted: Any) -> float:
    """Of all outputs, relative to how they differ from sample to sample."""
    with torch.no_grad():
        pairs = list(zip(floats(model(*inputs)), floats(wanted), strict=True))
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    return (lost / sum(float((b - b.mean(0)).square().sum()) for _, b in pairs)) ** 0.5


class TestOutputs:
    @every_net
    def test_more_bits_are_nearer(self, make: Callable[[], nn.Module]) -> None:
        lost = []
        for bits in (8, 4, 3, 2):
            net, x, before = quantized(make, bits=bits, ends=True, rounding="corrected")
            lost.append(error(net, (x,), before))
            for name, weight, step, grid in quantized_weights(net):
                assert grid.high == 2 ** (bits - 1) - 1, name
                assert len(integers(weight, step, grid).unique()) <= grid.levels
        assert lost[0] < 0.15
        assert all(small <= large * 1.1 for small, large in pairwise(lost)), lost

    @every_net
    @pytest.mark.parametrize("target", ["avx2", "gpu"])
    def test_targets_and_values(self, make: Callable[[], nn.Module], target: str) -> None:
        lost = []
        for bits in (8, 4):
            net, x, before = quantized(make, value_bits=bits, target=target, rounding="corrected")
            lost.append(error(net, (x,), before))
        assert lost[0] < 0.2
        assert lost[0] < lost[1] < 2.0

    @given(drawn=networks())
    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    def test_random_networks(self, drawn: tuple[RandomNetwork, Tensor]) -> None:
        model, _ = drawn
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = model(x)
        quantize(model, x, target="vnni", rounding="corrected")
        with torch.no_grad():
            after = model(x)
        assert torch.isfinite(after).all()
        assert not _get_current_function_mode_stack()
        assert (after - before).abs().mean() <= 0.1 * before.abs().mean() + 0.02

    @pytest.mark.parametrize("name", AWKWARD)
    def test_awkward_networks(self, name: str) -> None:
        model, inputs = randomize(AWKWARD[name]()).eval(), AWKWARD[name].example()
        with torch.no_grad():
            before = floats(model(*inputs))
        if name in WITHOUT:
            with pytest.raises(ValueError, match="there is no weight to quantize"):
                quantize(model, inputs, target="vnni")
            return
        quantize(model, inputs, target="vnni", rounding="nearest")
        with torch.no_grad():
            after = floats(model(*inputs))
        for a, b in zip(after, before, strict=True):
            assert torch.isfinite(a).all()
            assert (a - b).abs().mean() <= 0.1 * b.abs().mean() + 0.02

    def test_training_and_evaluation_round_in_the_same_places(self) -> None:
        """Nothing in between depends on the mode but BatchNorm, which computes as ever."""
        net, x, _ = quantized(Residual)
        for module in net.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        trained = net(x)
        trained.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        assert torch.equal(trained, net.eval()(x))

    def test_a_network_in_bfloat16(self) -> None:
        net, x, before = quantized(Residual)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert error(net, (x,), before) < 0.2


class TestRounding:
    @given(
        seed=st.integers(0, 9999), bits=st.sampled_from([4, 3, 2]), kind=st.sampled_from(["linear", "conv", "grouped"])
    )
    @few
    def test_outputs_on_calibration_data(self, seed: int, bits: int, kind: str) -> None:
        """Together is better than with biases alone, and that than neither."""
        torch.manual_seed(seed)
        mixing = torch.randn(6, 6)
        if kind == "linear":
            layer, x = nn.Linear(6, 8), torch.randn(100, 6) @ mixing + torch.randn(6)
        else:
            layer = nn.Conv2d(6, 8, 3, padding=1, groups=2 if kind == "grouped" else 1)
            x = (torch.einsum("nchw,cd->ndhw", torch.randn(20, 6, 6, 6), mixing) + torch.randn(6, 1, 1)).relu()
        net = nn.Sequential(layer)
        with torch.no_grad():
            before = net(x)
        lost = {}
        for rounding in ("nearest", "corrected", "joint"):
            trial = copy.deepcopy(net)
            prepared = quantize(trial, x, bits=bits, ends=True, target="vnni", rounding=rounding)
            with torch.no_grad():
                lost[rounding] = float((trial(x) - before).square().mean() / before.var())
            assert (rounding == "nearest") == (not prepared.errors)
        assert lost["corrected"] <= lost["nearest"] * 1.02 + 1e-4
        assert lost["joint"] <= lost["corrected"] * 1.02 + 1e-4

    @every_net
    def test_in_whole_networks(self, make: Callable[[], nn.Module]) -> None:
        lost = {}
        for rounding in ("nearest", "corrected", "joint"):
            net, x, before = quantized(make, bits=3, rounding=rounding)
            lost[rounding] = error(net, (x,), before)
        assert lost["joint"] < lost["corrected"] * 1.05
        assert lost["joint"] < lost["nearest"]

    @every_net
    def test_what_is_left_is_said(self, make: Callable[[], nn.Module]) -> None:
        """Rounded weights are multiples of their steps, and errors fall with bits."""
        told = []
        for bits in (8, 2):
            net = net_of(make)
            prepared = quantize(net, images(), bits=bits, ends=True)
            told.append(prepared.errors)
            for name, weight, step, grid in quantized_weights(net):
                whole = integers(weight, step, grid)
                assert torch.allclose(weight, whole * step.view(-1, *[1] * (weight.dim() - 1)), atol=1e-6), name
        assert told[0].keys() == told[1].keys()
        assert len(told[0]) == len(list(quantized_weights(net)))
        assert all(0 <= told[0][path] <= told[1][path] + 1e-9 for path in told[0])


class TestWrong:
    @pytest.mark.parametrize(
        ("precision", "message"),
        [
            ({"bits": 5}, "`bits` must be one of 8, 4, 3, 2, got 5"),
            ({"bits": True}, "`bits` must be one of"),
            ({"bits": {"head": 16}}, "`bits` must be one of 8, 4, 3, 2, got 16"),
            ({"value_bits": 3}, "`value_bits` must be one of 8, 4, got 3"),
            ({"observer": "median"}, "`observer` must be one of minmax, percentile, mse, entropy, got 'median'"),
            ({"rounding": "up"}, "`rounding` must be one of nearest, corrected, joint, got 'up'"),
            ({"target": "tpu"}, "`target` must be one of"),
            ({"ends": 1}, "`ends` must be true or false, got 1"),
            ({"budget": 0.5}, "`budget` must be a Budget"),
            ({"exclude": ("hed",)}, "'hed' matches no parameter and no module"),
            ({"bits": {"hed*": 4}}, r"'hed\*' matches no parameter and no module"),
            ({"exclude": ("*",)}, "there is no weight to quantize: stem.0.weight is excluded by pattern"),
        ],
    )
    def test_wrong_arguments(self, precision: dict[str, Any], message: str) -> None:
        net = net_of(Residual)
        with pytest.raises(ValueError, match=message):
            quantize(net, images(), **precision)
        assert history(net) == ()

    def test_wrong_data(self) -> None:
        for inputs, message in (([], "calibration data"), (images() * torch.nan, "not finite")):
            net = net_of(Residual)
            with pytest.raises(ValueError, match=message):
                quantize(net, inputs)
            assert history(net) == ()
        with pytest.raises(ValueError, match="there is no weight to quantize: none has two dims"):
            quantize(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()), images())
