"""Quantized networks: whoever copies, compiles or interrupts them, and for good."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from lightning_compress.edits import Companions, EditError, Keep, Replace, apply_edits, describe, history, rewind_edits
from lightning_compress.methods.posttraining import quantize
from lightning_compress.quantized import scope_of
from tests.contract.nets import NETS, Residual
from tests.quantizing import images, net_of, quantized

every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())


class TestLife:
    """Of a network that is watched."""

    @every_net
    def test_copies_compute_the_same_and_go_their_own_way(self, make: Callable[[], nn.Module]) -> None:
        net, x, _ = quantized(make)
        after = net(x)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        for twin in (copy.deepcopy(net), torch.load(file, weights_only=False), copy.deepcopy(copy.deepcopy(net))):
            assert torch.equal(twin(x), after)
            assert history(twin) == history(net)
            rewind_edits(twin)
            plain = net_of(make)
            plain.load_state_dict(twin.state_dict())
            assert torch.equal(twin(x), plain(x))
            assert torch.equal(net(x), after)
        with torch.no_grad():
            assert not torch.equal(plain(x), after)

    @every_net
    def test_rewinding_leaves_no_trace(self, make: Callable[[], nn.Module]) -> None:
        net, x = net_of(make), images()
        before, state = net(x), {name: value.clone() for name, value in net.state_dict().items()}
        twin = copy.deepcopy(net)
        edit = quantize(twin, x, rounding="nearest").edit
        apply_edits(net, [edit])
        assert history(net) == (edit,)
        assert net.state_dict().keys() == twin.state_dict().keys() > state.keys()
        rewind_edits(net)
        assert torch.equal(net(x), before)
        assert list(net.state_dict()) == list(state)
        assert not any("forward" in vars(m) or scope_of(m) for m in net.modules())
        net.load_state_dict(state)

    def test_an_edit_is_plain_data(self) -> None:
        net, x, _ = quantized(Residual, bits=4)
        (edit,) = history(net)
        assert type(edit).from_json(edit.to_json()) == edit
        other = net_of(Residual, 1)
        apply_edits(other, [edit])
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), net(x))

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, RuntimeError])
    def test_an_interrupted_run_is_over(self, interrupt: type[BaseException]) -> None:
        net, x, _ = quantized(Residual)
        after = net(x)

        def stop(*_: Any) -> None:
            raise interrupt

        for path in ("b.1", "a", "stem.0", "head"):
            handle = net.get_submodule(path).register_forward_hook(stop)
            with pytest.raises(interrupt):
                net(x)
            handle.remove()
            values = torch.linspace(-1, 1, 77)
            for _ in range(3):  # nobody's functions
                assert torch.equal(torch.relu(values), values.clamp_min(0))
                assert torch.equal((values[None, :, None, None] + 1).mean((2, 3)), values[None] + 1)
            assert torch.equal(net(x), after)
            assert not _get_current_function_mode_stack()

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled(self, backend: str) -> None:
        net, x, _ = quantized(Residual)
        torch.compiler.reset()
        compiled = torch.compile(net, backend=backend)
        with torch.no_grad():
            assert torch.allclose(compiled(x), net(x), atol=1e-5)
            net.get_buffer("mean_0_step").mul_(3)  # no constant of what was compiled
            assert torch.allclose(compiled(x), net(x), atol=1e-5)
        torch.compiler.reset()

    def test_networks_inside_of_one_another(self) -> None:
        """Each rounds its own."""
        net, x, _ = quantized(Residual)
        other, _, _ = quantized(Residual, bits=2)
        both = nn.ModuleList([net, other])

        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = both

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(self.parts[0](x)) + torch.relu(self.parts[1](x)).mul(0.5)

        assert torch.equal(Mean()(x), torch.relu(net(x)) + torch.relu(other(x)).mul(0.5))


class TestLast:
    """Quantization comes last, once."""

    def test_other_edits_are_refused(self) -> None:
        net, x, _ = quantized(Residual)
        after, state = net(x), list(net.state_dict())
        sides: dict[str, Any] = {name: tuple(p.shape) for name, p in net.named_parameters()}
        cut = {"a.0.0.weight": {0: tuple(range(8))}}
        spec = describe(net.get_submodule("head"))
        assert spec is not None
        edits = [
            Keep(cut, {"a.0.0.weight": sides["a.0.0.weight"]}),
            Replace({"head": (spec, {**spec, "bias": False})}),
            Companions("mask", {"b.1.weight": sides["b.1.weight"]}),
            Companions("mask", {"a.2.weight": sides["a.2.weight"]}),
        ]
        for edit in edits:
            with pytest.raises(EditError, match=r"is quantized; quantization comes last"):
                apply_edits(net, [edit])
        with pytest.raises(EditError, match="is quantized already"):
            apply_edits(net, history(net))
        with pytest.raises(ValueError, match=r"quantized already|there is no weight"):
            quantize(net, x)
        assert list(net.state_dict()) == state
        assert torch.equal(net(x), after)
