"""2:4 weights in the format of sparse tensor cores, where there are any; elsewhere the reason why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.methods.semi_structured import is_two_four, use_sparse_kernels
from lightning_compress.methods.sparsity import Pattern, make_masks

SPARSE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pruned(net: nn.Module) -> nn.Module:
    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    masks = make_masks({n: p.detach().abs() for n, p in weights.items()}, 0.5, Pattern("2:4"))
    for name, weight in weights.items():
        weight.data.mul_(masks[name])
    return net


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Conv2d(8, 3, 3), nn.Conv1d(4, 5, 2)])
def test_a_pruned_weight_is_two_four_and_one_weight_more_is_not(layer: nn.Module) -> None:
    assert not is_two_four(layer.weight)
    pruned(layer)
    assert is_two_four(layer.weight)
    dead = (layer.weight == 0).nonzero()[0]
    layer.weight.data[tuple(dead)] = 1.0
    assert not is_two_four(layer.weight)


def test_a_weight_without_groups_of_four_is_none() -> None:
    assert not is_two_four(torch.zeros(4, 6))
    assert not is_two_four(torch.zeros(4))


def test_without_kernels_everything_stays_and_says_why() -> None:
    net = pruned(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 64)))
    before = copy.deepcopy(net.state_dict())
    found = use_sparse_kernels(net)
    assert found.converted == ()
    assert "Conv2d" in found.left["0"]
    assert "cpu has no kernels" in found.left["2"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_dense_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no weight .* is 2:4 sparse"):
        use_sparse_kernels(nn.Linear(8, 8))


@pytest.mark.skipif(not SPARSE, reason="needs a GPU with sparse tensor cores")
def test_sparse_kernels_compute_the_same() -> None:
    net = pruned(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))).cuda().half()
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    dense = net(x)
    assert use_sparse_kernels(net).converted == ("0", "2")
    torch.testing.assert_close(net(x), dense, rtol=1e-2, atol=1e-2)
