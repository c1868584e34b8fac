"""Parallel branches: exact when they come, exact when they go, and trainable in between."""

from __future__ import annotations

import copy
import json
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.edits import apply_edits, edits_from_json, edits_to_json, history, rewind_edits
from lightning_compress.layers import Sum
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.reparameterization import Kind, expand, reparameterize
from tests.networks import randomize

KINDS: list[Kind] = ["repvgg", "dbb"]

property_test = settings(max_examples=15, deadline=None)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution with or without a norm, and its input."""
    sides, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    kernel, dilation, stride = draw(st.sampled_from([3, 5])), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    inputs = groups * draw(st.integers(1, 3))
    outputs = inputs if draw(st.booleans()) else groups * draw(st.integers(1, 3))
    padding: Any = "same" if stride == 1 and draw(st.booleans()) else dilation * (kernel // 2)
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = getattr(nn, f"Conv{sides}d")(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"])),
    )
    norm = getattr(nn, f"BatchNorm{sides}d")(outputs) if draw(st.booleans()) else nn.Identity()
    model = randomize(nn.Sequential(conv, norm, nn.ReLU()), draw(st.integers(0, 99)))
    return model.eval(), torch.randn(3, inputs, *[6] * sides)


def perturb(model: nn.Module, seed: int = 0) -> None:
    """As training would: other weights and other statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.3 * torch.rand(tensor.shape, generator=generator))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(network=networks(), seed=st.integers(0, 99))
def test_outputs_stay_the_same_there_and_back(kind: Kind, network: tuple[nn.Module, Tensor], seed: int) -> None:
    model, x = network
    with torch.no_grad():
        before = model(x)
        expand(model, x, kind)
        assert isinstance(model[0], Sum)
        close(model(x), before)
        perturb(model, seed)
        trained = model(x)
        reparameterize(model)
        assert type(model[0]).__name__.startswith("Conv")
        close(model(x), trained)


class Net(nn.Module):
    """Norms, a residual, a depthwise layer, one of a single tap, and one that nothing can be done about."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
        )
        self.down = nn.Sequential(nn.Conv2d(8, 12, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(12, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return cast(Tensor, self.down((x + self.body(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_trained_in_between(kind: Kind) -> None:
    torch.manual_seed(0)
    model, x = randomize(Net()), torch.randn(64, 3, 8, 8)
    reestimate_batchnorm(model, as_calls(x))
    with torch.no_grad():
        before = model.eval()(x), copy.deepcopy(model).train()(x)
        expand(model, x, kind)
        close(model(x), before[0])
        after = copy.deepcopy(model).train()(x)  # whole batches have the statistics that the norms were given
        assert (after - before[1]).square().mean() < 1e-3 * before[1].var()
    assert [
        isinstance(model.get_submodule(path), Sum) for path in ("stem.0", "body.0", "body.2", "down.0", "down.2")
    ] == [
        True,
        True,
        False,
        True,
        False,
    ]
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    losses = []
    for _ in range(10):
        loss = (model(x) - x.mean((2, 3)).sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model.eval()(x)
        reparameterize(model)
        close(model(x), trained)
        assert not any(isinstance(module, Sum) for module in model.modules())
    again = Net().eval()
    apply_edits(again, edits_from_json(json.loads(json.dumps(edits_to_json(history(model))))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    rewind_edits(again)
    again.load_state_dict(Net().state_dict())


def test_there_may_be_nothing_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1))
    with pytest.raises(ValueError, match="no convolution of more than one tap"):
        expand(model, torch.zeros(1, 3, 4, 4))
    assert reparameterize(model) == ()
    assert history(model) == ()


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="`kind` must be one of repvgg, dbb, got 'acb'"):
        expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), torch.zeros(1, 3, 4, 4), cast(Any, "acb"))


def test_other_sums_are_left_alone() -> None:
    model = nn.Sequential(Sum([nn.Identity(), nn.Conv2d(3, 3, 1)]))
    assert reparameterize(model) == ()
