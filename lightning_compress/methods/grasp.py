"""Gradient signal preservation: what pruning does to the gradients of an untrained network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["hessian_gradient"]

Visit = Callable[[Callable[[Tensor], None]], None]
"""Calls what it is given with the loss of each batch, its graph intact; the same losses each time."""


def hessian_gradient(weights: Mapping[str, Tensor], visit: Visit) -> dict[str, Tensor]:
    """The Hessian of a loss times its gradient, exactly, by differentiating twice.

    Removing a weight w changes the squared norm of the gradient by -2 w (H g) to first order; GraSP (Wang, Zhang and
    Grosse 2020, 'Picking winning tickets before training by preserving gradient flow', arXiv 2002.07376) scores by
    S = -w (H g), and removes the weights with the highest scores. As in the authors' code, g is the gradient of the
    weights that may be pruned, summed over batches in a first pass; a second pass sums H g. No more than one batch's
    graph is held.

    Args:
        weights: name -> weight, with respect to which is differentiated.
        visit: runs over the batches, called twice.

    Returns:
        Name -> H g, in float32; zero where a loss does not depend on a weight.

    Raises:
        ValueError: there was no loss, or none that depends on a weight.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_gradient({"w": w}, lambda see: see((w**3).sum()))  # 6 w times 3 w^2
        {'w': tensor([ 18., 144.])}
    """
    leaves = list(weights.values())
    total = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    product = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    seen = 0

    def add_gradient(loss: Tensor) -> None:
        nonlocal seen
        seen += 1
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for place, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                place.add_(gradient.detach())

    def add_product(loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        terms = [(g * t.to(g.dtype)).sum() for g, t in zip(gradients, total, strict=True) if g is not None]
        along = torch.stack([term.float() for term in terms]).sum()
        if not along.requires_grad:  # the loss is linear in the weights
            return
        for place, second in zip(product, torch.autograd.grad(along, leaves, allow_unused=True), strict=True):
            if second is not None:
                place.add_(second.detach())

    with torch.enable_grad():
        visit(add_gradient)
        if not seen or not any(bool(value.any()) for value in total):
            raise ValueError("no gradient of a loss has reached the weights that may be pruned")
        visit(add_product)
    return dict(zip(weights, product, strict=True))
