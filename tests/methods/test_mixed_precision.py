"""Bits within a budget, and scales exchanged between layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.artifact import artifact_bytes, load_compressed, save_compressed
from lightning_compress.budget import Budget, BudgetError
from lightning_compress.calls import as_calls
from lightning_compress.edits import history
from lightning_compress.methods.equalization import equalize
from lightning_compress.methods.placement import Pair, find_places
from lightning_compress.methods.posttraining import Precision, quantize
from tests.contract.nets import NETS, Residual
from tests.networks import RandomNetwork, networks, randomize
from tests.quantizing import images, net_of

every_net = pytest.mark.parametrize("make", [NETS["plain"], NETS["depthwise"]], ids=["plain", "depthwise"])


def bit_operations(macs: dict[str, float], bits: dict[str, int], value_bits: int = 8) -> float:
    return sum(macs[name] * bits[name] * value_bits for name in bits)


class TestBudgets:
    @every_net
    @pytest.mark.parametrize("part", [0.3, 0.7])
    @pytest.mark.parametrize("rounding", ["nearest", "joint"])
    def test_bytes_are_those_of_the_file(self, make: Callable[[], nn.Module], part: float, rounding: str) -> None:
        """Part of the way from the file of 2 bits to that of 8."""
        sizes = []
        for bits in (2, 8):
            net = net_of(make)
            quantize(net, images(), bits=bits, ends=True, target="vnni", rounding=rounding)
            sizes.append(artifact_bytes(net))
        limit = round(sizes[0] + part * (sizes[1] - sizes[0]))
        net = net_of(make)
        prepared = quantize(net, images(), budget=Budget(bytes=limit), target="vnni", rounding=rounding)
        assert sizes[0] < artifact_bytes(net) <= limit
        assert len(set(prepared.bits.values())) > 1
        assert set(prepared.bits.values()) <= {8, 4, 3, 2}
        assert prepared.bits.keys() == prepared.edit.weights.keys()

    @every_net
    def test_bit_operations(self, make: Callable[[], nn.Module]) -> None:
        for fraction in (0.05, 0.025):
            net = net_of(make)
            prepared = quantize(
                net, images(), budget=Budget(bit_operations=fraction), target="vnni", rounding="nearest"
            )
            macs, bits = dict(prepared.placement.macs), dict(prepared.bits)
            assert bit_operations(macs, bits) <= fraction * sum(macs.values()) * 32 * 32
            assert all(grid.high == 2 ** (bits[name] - 1) - 1 for name, grid in prepared.edit.weights.items())

    @every_net
    @pytest.mark.parametrize("budget", [Budget(bytes=1.0), Budget(bytes=0.95, bit_operations=0.0626)])
    def test_generous_budgets_take_nothing_away(self, make: Callable[[], nn.Module], budget: Budget) -> None:
        net, plain = net_of(make), net_of(make)
        prepared = quantize(net, images(), budget=budget, target="vnni", rounding="nearest")
        assert set(prepared.bits.values()) == {8}
        quantize(plain, images(), target="vnni", rounding="nearest")
        state = plain.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    @every_net
    @pytest.mark.parametrize("unit", ["bytes", "bit_operations"])
    def test_the_lowest_that_can_be_met_can_be_met(self, make: Callable[[], nn.Module], unit: str) -> None:
        net = net_of(make)
        with pytest.raises(BudgetError, match=rf"weights of 2 bits: [\d,]+ {unit} \(0\.\d+ of the dense") as raised:
            quantize(net, images(), budget=Budget(**{unit: 0.001}), target="vnni")
        assert history(net) == ()
        found = re.search(rf"([\d,]+) {unit}", str(raised.value))
        assert found is not None
        lowest = int(found[1].replace(",", ""))
        quantize(net, images(), budget=Budget(**{unit: lowest + 1}), target="vnni", rounding="nearest")
        assert unit != "bytes" or artifact_bytes(net) <= lowest + 1
        with pytest.raises(BudgetError):
            quantize(net_of(make), images(), budget=Budget(**{unit: round(0.98 * lowest)}), target="vnni")

    def test_fewer_bits_where_they_are_missed_least(self) -> None:
        """A layer whose weights are few values loses nothing by it."""
        net = net_of(Residual)
        weight = net.get_parameter("b.1.weight")
        weight.data = weight.data.sign() * 0.05
        macs = find_places(net, as_calls(images(2))).macs
        budget = 1 / 16 - macs["b.1.weight"] * 6 * 8 / (sum(macs.values()) * 1024) + 1e-6
        prepared = quantize(net, images(), budget=Budget(bit_operations=budget), target="vnni")
        assert prepared.bits["b.1.weight"] == 2
        assert min(bits for name, bits in prepared.bits.items() if name != "b.1.weight") >= 4

    @pytest.mark.parametrize(
        ("precision", "message"),
        [
            ({"budget": Budget(macs=0.5)}, "cannot keep a budget of macs; it can of bytes, bit_operations"),
            ({"budget": Budget(bytes=0.5), "bits": 4}, "give either `bits` or `budget`"),
        ],
    )
    def test_wrong_budgets(self, precision: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Precision(**precision)  # type: ignore[arg-type]


def test_bits_by_pattern() -> None:
    """The first that matches counts, the ends like any other; what none matches has 8."""
    prepared = quantize(net_of(Residual), images(), rounding="nearest", bits={"a.1": 3, "a*": 4, "head": 2})
    assert dict(prepared.bits) == {
        "stem.0.weight": 8,
        "a.0.0.weight": 4,
        "a.1.weight": 3,
        "shortcut.weight": 8,
        "b.0.0.weight": 8,
        "b.1.weight": 8,
        "head.weight": 2,
    }
    prepared = quantize(net_of(Residual), images(), bits=4, rounding="nearest")
    assert [name for name, bits in prepared.bits.items() if bits == 8] == ["stem.0.weight", "head.weight"]
    assert set(quantize(net_of(Residual), images(), bits=4, ends=True, rounding="nearest").bits.values()) == {4}


@every_net
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_artifact_holds_integers(make: Callable[[], nn.Module], bits: int, tmp_path: Path) -> None:
    """And loads to what was saved, at the size that was told."""
    net, x = net_of(make), images()
    dense = artifact_bytes(net)
    quantize(net, x, bits=bits, ends=True)
    path = tmp_path / "net.safetensors"
    save_compressed(net, path)
    loaded = load_compressed(path, make())
    assert torch.equal(loaded(x), net(x))
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert artifact_bytes(net) <= dense - weights * (32 - bits) / 8 + 0.2 * weights + 6000


class TestEqualization:
    """Scales move between layers; outputs do not."""

    @given(
        widths=st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=4),
        groups=st.sampled_from([1, 2, 4]),
        norm=st.sampled_from(["none", "batch", "negative", "zero"]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    def test_chains(self, widths: list[int], groups: int, norm: str, seed: int) -> None:
        sides = [4, *widths]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sides, widths, strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups))
            layers += [] if norm == "none" else [nn.BatchNorm2d(outputs)]
            layers.append(nn.ReLU())
        net = randomize(nn.Sequential(*layers), seed).eval()
        with torch.no_grad():
            for part in net:
                if isinstance(part, nn.BatchNorm2d):
                    part.weight[0] *= {"negative": -1, "zero": 0}.get(norm, 1)
                elif isinstance(part, nn.Conv2d):
                    part.weight *= torch.logspace(-2, 0, len(part.weight)).view(-1, 1, 1, 1)
                    part.weight[1] = 0
        x = torch.randn(4, 4, 8, 8)
        pairs = find_places(net, as_calls(x)).pairs
        assert len(pairs) == len(widths) - 1
        with torch.no_grad():
            before = net(x)
            equalize(net, pairs)
            after = net(x)
        assert torch.allclose(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()) + 1e-9)

    @given(drawn=networks())
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    def test_random_networks(self, drawn: tuple[RandomNetwork, Tensor]) -> None:
        model, x = drawn
        with torch.no_grad():
            before = model(x)
            equalize(model, find_places(model, as_calls(x)).pairs)
            assert torch.allclose(model(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()) + 1e-6)

    def test_channels_use_the_whole_grid(self) -> None:
        """What goes out of one layer and what the next makes of it are of a size."""
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        net[0].weight.data *= torch.logspace(-1, 1, 8)[:, None]
        equalize(net, [Pair("0.weight", "2.weight", bias="0.bias")])
        assert torch.allclose(net[0].weight.abs().amax(1), net[2].weight.abs().amax(0), rtol=1e-4)

    def test_a_norm_over_another_dim_is_none_of_the_layer(self) -> None:
        """Of sequences, BatchNorm1d takes the places to be its channels."""
        net = randomize(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))).eval()
        x = torch.randn(32, 6, 6)
        placed = find_places(net, as_calls(x))
        assert not placed.folded
        with torch.no_grad():
            before = net(x)
            equalize(net, placed.pairs)
            assert torch.allclose(net(x), before, atol=1e-5)

    def test_values_of_few_bits_gain_by_it(self) -> None:
        """Where channels differ much in size, and one grid is for all."""
        layers = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU())
        net, x = randomize(nn.Sequential(*layers)).eval(), images()
        with torch.no_grad():
            size = torch.logspace(-2, 1, 16)
            net[1].weight *= size
            net[1].bias *= size
            net[3].weight /= size[:, None, None]
            before, lost = net(x), []
            for equalization in (False, True):
                trial = copy.deepcopy(net)
                quantize(trial, x, value_bits=4, equalization=equalization, target="vnni")
                lost.append(float((trial(x) - before).square().mean()))
        assert lost[1] < 0.8 * lost[0]
