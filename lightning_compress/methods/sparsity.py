"""Which weights go: patterns and allocations of weight pruning, as pure functions on scores.

A criterion scores every weight (`scoring`); a pattern says which weights are pruned together; an allocation shares a
sparsity out over layers. Masks are made of all three, with as many zeros as were asked for, up to the size of a group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ALLOCATIONS",
    "Pattern",
    "exchange",
    "lamp",
    "make_masks",
    "silence",
]

ALLOCATIONS = ("global", "uniform", "erk", "lamp")
"""global: all weights compete. uniform: every layer has the same sparsity. erk: Erdos-Renyi-Kernel, small layers stay
denser (Evci et al. 2020, arXiv 1911.11134). lamp: all compete by their score relative to those above it in their layer
(Lee et al. 2021, arXiv 2010.07611)."""


@torch.no_grad()
def silence(tensors: Iterable[Tensor | None], dead: Iterable[Tensor]) -> None:
    """Zero, in place, where weights are dead; a product would leave zeros with a sign, which are other bits."""
    for tensor, where in zip(tensors, dead, strict=True):
        if tensor is not None:
            tensor.masked_fill_(where, 0.0)


@dataclass(frozen=True)
class Pattern:
    """Which weights of a tensor are pruned together.

    Args:
        name: `unstructured`; `kernel` (of a convolution, for one pair of channels); `block:AxB` (of the matrix of
            outputs and all else); or `N:M`: of each M inputs in a row, N stay (2:4 is what GPUs have kernels for).

    Raises:
        ValueError: another name.

    Example:
        >>> Pattern("2:4").keep, Pattern("block:4x2").sides
        ((2, 4), (4, 2))
        >>> Pattern("rows")
        Traceback (most recent call last):
        ValueError: `pattern` must be unstructured, kernel, block:AxB or N:M, e.g. 2:4, got 'rows'
    """

    name: str

    def __post_init__(self) -> None:
        wrong = self.name not in ("unstructured", "kernel") and self.keep is None and self.sides is None
        if wrong or (self.keep and not 0 < self.keep[0] < self.keep[1]) or (self.sides and 0 in self.sides):
            raise ValueError(f"`pattern` must be unstructured, kernel, block:AxB or N:M, e.g. 2:4, got {self.name!r}")

    @property
    def keep(self) -> tuple[int, int] | None:
        """How many stay, of how many, for N:M."""
        found = re.fullmatch(r"(\d+):(\d+)", self.name)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Of a block."""
        found = re.fullmatch(r"block:(\d+)x(\d+)", self.name)
        return (int(found[1]), int(found[2])) if found else None

    def refuses(self, weight: Tensor) -> str | None:
        """Why a tensor cannot be pruned so; None if it can."""
        outputs, rest = weight.shape[0], weight[0].numel()
        if self.name == "kernel" and weight.dim() < 3:
            return "has no kernels"
        if self.keep and weight.shape[1] % self.keep[1]:
            return f"its {weight.shape[1]} inputs are no multiple of {self.keep[1]}"
        if self.sides and (outputs % self.sides[0] or rest % self.sides[1]):
            return f"its matrix of {outputs} x {rest} has no whole number of blocks of {self.name[6:]}"
        return None

    def grouped(self, scores: Tensor) -> Tensor:
        """Scores as [groups, members]."""
        if self.name == "kernel":
            return scores.flatten(2).flatten(0, 1)
        if self.sides:
            rows, columns = self.sides
            matrix: Tensor = scores.flatten(1).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
            return matrix.transpose(1, 2).flatten(2).flatten(0, 1)
        if self.keep:
            return scores.transpose(1, -1).reshape(-1, self.keep[1])
        return scores.reshape(-1, 1)

    def ungrouped(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `grouped`."""
        if self.sides:
            rows, columns = self.sides
            across = math.prod(shape[1:]) // columns
            blocks = groups.view(-1, across, rows, columns).transpose(1, 2)
            return blocks.reshape(shape)
        if self.keep:
            turned = list(shape)
            turned[1], turned[-1] = turned[-1], turned[1]
            return groups.reshape(turned).transpose(1, -1).contiguous()
        return groups.reshape(shape)


def make_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    pattern: Pattern,
    allocation: str = "global",
    floor: float = 0.0,
    amount: float = 1.0,
) -> dict[str, Tensor]:
    """Masks of which a share is zero.

    Args:
        scores: name -> scores, larger ones stay; each tensor has at least two dims, outputs first.
        sparsity: share of all weights that go; not used by N:M, which has its own.
        pattern: which go together.
        allocation: one of `ALLOCATIONS`.
        floor: least share of each tensor that stays.
        amount: how far on the way to that: the share that goes is multiplied by it.

    Returns:
        Name -> mask, True where a weight stays.

    Example:
        >>> masks = make_masks({"a": torch.tensor([[1.0, 4.0], [2.0, 3.0]])}, 0.5, Pattern("unstructured"))
        >>> masks["a"]
        tensor([[False,  True],
                [False,  True]])
    """
    if not scores:
        return {}
    groups = {name: pattern.grouped(value.float()) for name, value in scores.items()}
    if pattern.keep:
        kept = pattern.keep[1] - round(amount * (pattern.keep[1] - pattern.keep[0]))
        alive = {name: _top(value, kept) for name, value in groups.items()}
        return {name: pattern.ungrouped(value, scores[name].shape) for name, value in alive.items()}
    means = {name: value.mean(1) for name, value in groups.items()}
    share = sparsity * amount
    if allocation in ("uniform", "erk"):
        sizes = {name: value.shape for name, value in scores.items()}
        density = _erk(sizes, 1 - share) if allocation == "erk" else dict.fromkeys(scores, 1 - share)
        alive = {name: _largest(value, round(max(density[name], floor) * len(value))) for name, value in means.items()}
    else:
        if allocation == "lamp":
            means = {name: lamp(value) for name, value in means.items()}
        alive = _compete(means, {name: value.shape[1] for name, value in groups.items()}, share, floor)
    return {
        name: pattern.ungrouped(value[:, None].expand(groups[name].shape), scores[name].shape)
        for name, value in alive.items()
    }


@torch.no_grad()
def exchange(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> int:
    """Let the smallest of the living weights die, and as many of the dead ones live: those with the largest gradients.

    Args:
        weight: the weight.
        mask: where it is alive; changed in place.
        gradient: of the loss, of dead weights too.
        share: of the living ones.

    Returns:
        How many were exchanged.

    Example:
        >>> mask = torch.tensor([1, 1, 0, 0], dtype=torch.uint8)
        >>> exchange(torch.tensor([3.0, 1.0, 0.0, 0.0]), mask, torch.tensor([0.0, 0.0, 1.0, -2.0]), 0.5), mask.tolist()
        (1, [1, 0, 0, 1])
    """
    alive, slope = mask.bool().flatten(), gradient.detach().flatten().abs()
    count = min(int(share * int(alive.sum())), int((~alive).sum()))
    if count:
        dying = torch.where(alive, weight.detach().abs().flatten(), torch.inf).topk(count, largest=False).indices
        born = torch.where(alive, -torch.inf, slope).topk(count).indices
        alive[dying], alive[born] = False, True
        mask.copy_(alive.view(mask.shape))  # whatever its memory format
    return count


def _top(groups: Tensor, count: int) -> Tensor:
    """The largest of each row."""
    places = groups.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True)


def _largest(scores: Tensor, count: int) -> Tensor:
    return _top(scores[None], count)[0]


def _compete(scores: Mapping[str, Tensor], sizes: Mapping[str, int], share: float, floor: float) -> dict[str, Tensor]:
    """Groups of all tensors in one order; the last go, but for those that the floor keeps."""
    lifted = []
    for value in scores.values():
        least = math.ceil(floor * len(value))
        lifted.append(torch.where(_largest(value, least), torch.inf, value) if least else value)
    order = torch.cat(lifted).argsort(stable=True)
    cost = torch.cat([torch.full_like(value, sizes[name]) for name, value in scores.items()])[order].double().cumsum(0)
    gone = order[: int((cost <= share * float(cost[-1]) + 0.5).sum())]
    alive = torch.ones(len(order), dtype=torch.bool, device=order.device)
    alive[gone] = False
    kept = torch.isinf(torch.cat(lifted))
    parts = (alive | kept).split([len(value) for value in scores.values()])
    return dict(zip(scores, parts, strict=True))


def lamp(scores: Tensor) -> Tensor:
    """Each squared score over the sum of those that are not below it."""
    order = scores.argsort(stable=True)
    squares = scores[order].double().square()
    above = squares.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(scores)
    found[order] = (squares / above.clamp_min(1e-300)).to(scores.dtype)
    return found


def _erk(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Densities in proportion to the sum of a tensor's sides over their product; at most 1, together as asked."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = left / max(sum(raw[name] * sizes[name] for name in shapes if name not in dense), 1e-300)
        full = {name for name in shapes if name not in dense and raw[name] * scale > 1}
        if not full:
            return {name: 1.0 if name in dense else max(0.0, raw[name] * scale) for name in shapes}
        dense |= full
