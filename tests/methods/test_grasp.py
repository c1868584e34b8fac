"""The Hessian times the gradient, and what the score says of the flow of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.methods.grasp import hessian_gradient
from lightning_compress.methods.scoring import score

BATCHES = [(torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(2)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers).double()


def loss_of(net: nn.Module, weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(torch.func.functional_call(net, weights, batch[0]), batch[1])


def prunable(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.dim() >= 2}


def visitor(net: nn.Module) -> Callable[[Callable[[Tensor], None]], None]:
    def visit(see: Callable[[Tensor], None]) -> None:
        for x, y in BATCHES:
            see(nn.functional.cross_entropy(net(x), y))

    return visit


def test_it_is_the_hessian_times_the_gradient() -> None:
    """Of the sum over batches, against the Hessian itself."""
    net = network()
    weights = prunable(net)
    found = hessian_gradient(weights, visitor(net))
    sizes, shapes = [w.numel() for w in weights.values()], [w.shape for w in weights.values()]

    def total(flat: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return sum((loss_of(net, dict(zip(weights, parts, strict=True)), b) for b in BATCHES), torch.zeros(()))

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    product = torch.autograd.functional.hessian(total, flat) @ torch.autograd.functional.jacobian(total, flat)
    assert torch.allclose(torch.cat([value.flatten() for value in found.values()]).double(), product, atol=1e-6)


def test_the_score_says_what_pruning_does_to_the_flow_of_gradients() -> None:
    """-2 score is the slope of the squared norm of the gradient as a weight goes towards zero; large scores stay."""
    net = network()
    weights = prunable(net)
    products = hessian_gradient(weights, visitor(net))
    scores = {name: score("grasp", w, gathered=products[name]) for name, w in weights.items()}

    def flow(values: dict[str, Tensor]) -> float:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        loss = sum((loss_of(net, leaves, batch) for batch in BATCHES), torch.zeros(()))
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(leaves.values())))

    for name, place in (("0.weight", (0, 0, 1, 1)), ("0.weight", (1, 0, 2, 0)), ("4.weight", (2, 7))):
        ends = []
        for step in (-1e-4, 1e-4):
            moved = {key: w.detach().clone() for key, w in weights.items()}
            moved[name][place] *= 1 - step
            ends.append(flow(moved))
        slope = (ends[1] - ends[0]) / 2e-4
        assert slope == pytest.approx(-2 * float(scores[name][place]), rel=1e-3)


def test_losses_that_say_nothing() -> None:
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient of a loss has reached the weights"):
        hessian_gradient({"w": w}, lambda see: None)
    with pytest.raises(ValueError, match="no gradient of a loss has reached the weights"):
        hessian_gradient({"w": w}, lambda see: see(torch.ones(1, requires_grad=True).sum()))
    assert not hessian_gradient({"w": w}, lambda see: see(w.sum()))["w"].any()
    with pytest.raises(ValueError, match="second derivatives of the loss are not finite"):
        score("grasp", w, gathered=torch.full((2, 2), torch.nan))
