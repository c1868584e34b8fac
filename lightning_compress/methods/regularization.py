"""Sparsity learning: regularisers that empty channels before they are cut, as gradients added to those of the loss.

A channel lives in slices of several tensors; what counts is all of them together. Where they are is worked out once
for a coupling (`ChannelSlices`); a step is then one pass over the tensors. Sums are taken in a fixed order, so that
every rank adds the same bits, on GPUs too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.coupling import Coupling, Mask
from lightning_compress.coupling.labels import Vector
from lightning_compress.edits import Keep

__all__ = [
    "REGULARIZATIONS",
    "ChannelSlices",
    "cut_of",
    "group_norm_factors",
    "growth",
    "lasso_factors",
    "norm_scales",
    "pull_scales",
]

REGULARIZATIONS: Mapping[str, float] = {"slimming": 1e-4, "group_lasso": 1e-3, "group_norm": 1e-4, "growing": 1.0}
"""Name -> strength, where none is given.

slimming: L1 on the scales of norms (Liu et al. 2017, arXiv 1708.06519, whose strength it is). group_lasso: the norm of
each channel (Wen et al. 2016, arXiv 1608.03665). group_norm: its square, more for the small channels of a layer (Fang
et al. 2023, 'DepGraph', arXiv 2301.12900; the strength is that of their code). growing: the square, for channels marked
to be cut, ever stronger (Wang et al. 2021, arXiv 2012.09243, whose ceiling the strength is)."""

ALPHA = 4.0
"""Of `group_norm`: the smallest channel of a layer is pulled 2^ALPHA times as much as the largest."""

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""Modules whose weight scales channels."""


@dataclass(frozen=True)
class _Place:
    """A dim in which channels live.

    Attributes:
        dim: the dim.
        slots: for each index, its channel; the number of channels for what can never be cut.
        members: the channels that live here.
        table: for each of them its indices; the size of the dim fills rows up.
    """

    dim: int
    slots: Tensor
    members: Tensor
    table: Tensor


class ChannelSlices:
    """Where the channels that can be cut live: for each tensor its dims, and the channel of each index.

    Args:
        coupling: the traced network; what is frozen in it is not regularised.

    Attributes:
        classes: the channels, as classes of the coupling, layer by layer.

    Example:
        >>> from lightning_compress.coupling import trace_coupling
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0], [0.0]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[4.0, 1.0]]))
        >>> slices = ChannelSlices(trace_coupling(net, torch.zeros(1, 1)))
        >>> slices.norms(dict(net.named_parameters()))
        tensor([5., 1.])
        >>> net(torch.zeros(1, 1)).sum().backward()
        >>> slices.pull(dict(net.named_parameters()), torch.tensor([1.0, 0.0]), 0.1)
        >>> net[2].weight.grad
        tensor([[0.4000, 0.0000]])
    """

    def __init__(self, coupling: Coupling) -> None:
        self.classes: Vector = np.concatenate([*(group.classes for group in coupling.groups), np.empty(0, np.int64)])
        self._sizes = [len(group.classes) for group in coupling.groups]
        self._coupling_size = coupling.count
        slot_of = np.full(coupling.count, len(self.classes))
        slot_of[self.classes] = np.arange(len(self.classes))
        parameters = dict(coupling.model.named_parameters(remove_duplicate=False))
        self._places: dict[str, list[_Place]] = {}
        for (name, dim), classes in coupling.locations.items():
            slots = slot_of[classes]
            if name in parameters and (slots < len(self.classes)).any():
                place = _place(dim, slots, len(self.classes), parameters[name].device)
                self._places.setdefault(name, []).append(place)
        device = parameters[next(iter(self._places))].device if self._places else torch.device("cpu")
        starts = np.cumsum([0, *self._sizes])
        longest = max(self._sizes, default=1)
        rows = [np.minimum(np.arange(longest), size - 1) + starts[i] for i, size in enumerate(self._sizes)]
        self.rows = torch.from_numpy(np.stack(rows) if rows else np.empty((0, 1), np.int64)).to(device)
        layers = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self.layers = torch.from_numpy(layers).to(device)

    @torch.no_grad()
    def norms(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The L2 norm of each channel, over all slices of all parameters in which it lives; float32.

        Args:
            parameters: by name, under every name.
        """
        total = torch.zeros(len(self.classes), device=self.rows.device)
        for name, places in self._places.items():
            squares = parameters[name].detach().float().square()
            rest = [d for d in range(squares.dim()) if all(d != place.dim for place in places)]
            squares = squares.sum(rest, keepdim=True) if rest else squares  # kernels once, whatever is asked of them
            for place in places:
                along = squares.movedim(place.dim, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
                padded = torch.cat([along, along.new_zeros(1)])
                total[place.members] += padded[place.table].sum(1)
        return total.sqrt()

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, Tensor], factors: Tensor, strength: float) -> None:
        """Add `strength` x factor x weight to the gradient of each channel's weights.

        Args:
            parameters: by name, under every name; those without gradients, and those left out, are left alone.
            factors: one for each channel, float32.
            strength: of the whole.
        """
        padded = torch.cat([factors, factors.new_zeros(1)])
        for name, places in self._places.items():
            weight = parameters.get(name)
            if weight is None or weight.grad is None:
                continue
            each = [
                padded[place.slots].view([-1 if d == place.dim else 1 for d in range(weight.dim())]) for place in places
            ]
            factor = sum(each[1:], each[0]).to(weight.dtype)
            weight.grad.addcmul_(weight.detach(), factor, value=strength)

    def among(self, marked: Mask) -> Tensor:
        """One for the channels in a mask over the classes, zero for others."""
        return torch.from_numpy(marked[self.classes]).to(self.rows.device).float()


def _place(dim: int, slots: Vector, count: int, device: torch.device) -> _Place:
    members, inverse, repeats = np.unique(slots[slots < count], return_inverse=True, return_counts=True)
    table = np.full((len(members), int(repeats.max())), len(slots))
    order = np.argsort(inverse, kind="stable")
    columns = np.arange(len(order)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    table[inverse[order], columns] = np.flatnonzero(slots < count)[order]
    return _Place(dim, *(torch.from_numpy(array).to(device) for array in (slots, members, table)))


def group_norm_factors(slices: ChannelSlices, norms: Tensor, alpha: float = ALPHA) -> Tensor:
    """How much `group_norm` pulls each channel: 2^(alpha (largest - norm) / (largest - smallest)), within its layer.

    Fang et al. 2023, 'DepGraph: towards any structural pruning', arXiv 2301.12900: the gradient of half the sum of
    factor x norm^2, the factors held fixed.

    Args:
        slices: says which channels make a layer.
        norms: of the channels.
        alpha: logarithm of what the smallest is pulled more than the largest.
    """
    if not len(norms):
        return norms
    layers = norms[slices.rows]
    largest, smallest = layers.amax(1)[slices.layers], layers.amin(1)[slices.layers]
    spread = (largest - smallest).clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.exp2(alpha * (largest - norms) / spread)


def lasso_factors(norms: Tensor) -> Tensor:
    """How much `group_lasso` pulls: one over the norm, so that the pull of every channel is as strong; none at zero.

    The gradient of the sum of norms (Wen et al. 2016, 'Learning structured sparsity', arXiv 1608.03665).

    Args:
        norms: of the channels.

    Example:
        >>> lasso_factors(torch.tensor([2.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    return torch.where(norms > 0, 1.0 / norms, 0.0)


def growth(progress: float) -> float:
    """How far `growing` has grown: in proportion to the steps over the first half of the way to the cut, then full.

    Args:
        progress: from the marking (0) to the cut (1).

    Example:
        >>> growth(0.0), growth(0.25), growth(0.9)
        (0.0, 0.5, 1.0)
    """
    return min(1.0, max(0.0, 2.0 * progress))


def cut_of(coupling: Coupling, keep: Keep) -> Mask:
    """The classes that an edit removes: the inverse of `Coupling.keep_edit`.

    Args:
        coupling: of the network before the edit.
        keep: the edit.
    """
    cut = coupling.nothing_cut()
    for (name, dim), classes in coupling.locations.items():
        kept = keep.slices.get(name, {}).get(dim)
        if kept is not None:
            cut[np.delete(classes, list(kept))] = True
    return cut


def norm_scales(model: nn.Module) -> Iterator[Tensor]:
    """The scales of all norm layers."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            yield module.weight


@torch.no_grad()
def pull_scales(scales: Iterator[Tensor], strength: float) -> None:
    """Add the gradient of `strength` x |scale| (network slimming, Liu et al. 2017, arXiv 1708.06519).

    Args:
        scales: of norms; those without gradients are left alone.
        strength: weight of the L1 term.
    """
    for scale in scales:
        if scale.grad is not None:
            scale.grad.add_(scale.detach().sign(), alpha=strength)
