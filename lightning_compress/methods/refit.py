"""Refit: what remains takes over what was cut, from a few hundred unlabelled inputs and no training.

A consumer of cut channels saw x; it now sees the survivors x_k. The cut ones are predicted
from the survivors by least squares, x_r = A x_k, and folded into the consumer's weight, W_k + W_r A, so that its output
changes as little as linear algebra allows on the data (ThiNet, Luo et al. 2017, arXiv 1707.06342, solves the like for
one layer at a time).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, run_calls
from lightning_compress.coupling import Coupling, Mask
from lightning_compress.coupling.labels import Vector
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.moments import Moments
from lightning_compress.methods.uses import Uses, find_uses
from lightning_compress.quiet import undisturbed
from lightning_compress.waiting import working

__all__ = ["Refit"]

MAX_CHANNELS = 4096
"""Consumers with more inputs (a flattened image) are not refitted: the solve would cost more than it gives."""

RIDGE = 1e-3
"""Tikhonov term, relative to the mean variance of the survivors."""


class Refit:
    """Least-squares refit of the layers that consume what is cut.

    Construct it before the edit (it runs the network and solves), apply it after. Convolutions, transposed and grouped
    ones too, and linear layers that own their weight; the channels of a convolution are predicted pixel by pixel.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> from lightning_compress.coupling import trace_coupling
        >>> from lightning_compress.edits import apply_edits
        >>> net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
        >>> _ = net[0].weight.data[1].copy_(2 * net[0].weight.data[0])  # the second channel is twice the first
        >>> x = torch.randn(64, 4)
        >>> before = net(x)
        >>> coupling = trace_coupling(net, x)
        >>> cut = coupling.nothing_cut()
        >>> cut[coupling.groups[0].classes[0]] = True
        >>> refit = Refit(net, coupling, cut, as_calls(x))
        >>> _ = apply_edits(net, [coupling.keep_edit(cut)])
        >>> refit.apply()
        >>> torch.allclose(net(x), before, atol=0.05)
        True
    """

    def __init__(self, model: nn.Module, coupling: Coupling, cut: Mask, calls: Sequence[Call]) -> None:
        """Gather the moments of every consumer's input and solve for its new weight.

        Args:
            model: the network, before the edit.
            coupling: its coupling.
            cut: the classes that will go.
            calls: calibration data.
        """
        self.model, self.calls = model, calls
        consumers = list(_consumers(model, coupling, cut, find_uses(model, calls)))
        handles = [consumer.module.register_forward_pre_hook(consumer.gather) for consumer in consumers]
        try:
            with undisturbed(model), working("calibrating: running the network on calibration data"):
                run_calls(model, calls)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad(), working("refitting the layers that lose inputs"):
            self._new = [(consumer.module, *consumer.solve()) for consumer in consumers if consumer.moments.count]

    def apply(self) -> None:
        """Set the new weights and re-estimate BatchNorm; the edit must have been applied."""
        with torch.no_grad():
            for module, weight, bias in self._new:
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)  # type: ignore[union-attr]
        reestimate_batchnorm(self.model, self.calls)


@dataclass
class _Consumer:
    """A layer that loses input channels."""

    module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    moments: Moments
    """Of its input channels, pixel by pixel."""
    living: Tensor
    """(groups, channels of a group): which inputs stay."""
    produced: Tensor
    """Which indices of the weight's output dim stay."""
    normed: bool
    """A norm with re-estimated statistics follows, which takes over any change of the mean."""

    def gather(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        self.moments.add(args[0], args[0])

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias after the edit."""
        weight, bias = self.module.weight.detach().double(), self.module.bias
        transposed = getattr(self.module, "transposed", False)
        groups = len(self.living)
        # As (groups, outputs of a group, inputs of a group, kernel), whichever way the weight is laid out.
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        blocks = blocks.transpose(1, 2) if transposed else blocks
        centred = self.normed or bias is not None
        second, mean = self.moments.patches(centred)
        new, shift = [], []
        for group, living in enumerate(self.living):
            a = _predict(second[group], living)
            offset = mean[group][~living] - a @ mean[group][living] if centred else a.new_zeros(len(a))
            gone = blocks[group][:, ~living]
            new.append(blocks[group][:, living] + torch.einsum("ork,rl->olk", gone, a))
            shift.append(torch.einsum("ork,r->o", gone, offset))
        result = torch.stack(new)
        result = result.transpose(1, 2) if transposed else result
        result = result.flatten(0, 1).reshape(-1, result.shape[2], *weight.shape[2:])
        result = result.index_select(1 if transposed else 0, self.produced)
        if bias is None:
            return result.to(self.module.weight.dtype), None
        kept = self.produced
        if transposed:  # the outputs of every group lose the same positions
            per_group = weight.shape[1]
            kept = (torch.arange(groups, device=kept.device)[:, None] * per_group + kept).flatten()
        moved = bias.detach().double() + torch.cat(shift)
        return result.to(self.module.weight.dtype), moved.index_select(0, kept).to(bias.dtype)


def _predict(second: Tensor, living: Tensor) -> Tensor:
    """The least-squares A of x_gone = A x_living, from second moments of all of x."""
    inner = second[living][:, living]
    ridge = RIDGE * inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    solution: Tensor = torch.linalg.solve(inner, second[living][:, ~living])
    return solution.T


def _consumers(model: nn.Module, coupling: Coupling, cut: Mask, uses: Uses) -> Iterator[_Consumer]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        weight, name = module._parameters.get("weight"), f"{path}.weight".lstrip(".")
        if weight is None or names[id(weight)] != [name]:  # parametrised, or tied: other uses would not agree
            continue
        if id(weight) in uses.outside or path in uses.downward:  # what serves one use would harm the other
            continue
        transposed, groups = bool(getattr(module, "transposed", False)), int(getattr(module, "groups", 1))
        inner, outer = (0, 1) if transposed else (1, 0)
        classes = coupling.locations.get((name, inner))
        per_group = weight.shape[inner] // groups if transposed else weight.shape[inner]
        if classes is None or not cut[classes].any() or not 1 < per_group * groups <= MAX_CHANNELS or per_group == 1:
            continue
        living = torch.from_numpy(~cut[classes]).to(weight.device).view(groups if transposed else 1, -1)
        made = coupling.locations.get((name, outer), np.empty(0, np.int64))
        produced = np.flatnonzero(~cut[made]) if len(made) else np.arange(weight.shape[outer])
        yield _Consumer(
            module,  # type: ignore[arg-type]
            Moments(_pixels(module, per_group * groups, groups), cross=False),
            living.expand(groups, -1),
            torch.from_numpy(produced).to(weight.device),
            _is_normed(coupling, made),
        )


def _pixels(module: nn.Module, channels: int, groups: int) -> Geometry:
    """A layer that gives back each pixel of what another layer sees."""
    sides = 0 if isinstance(module, nn.Linear) else cast(Tensor, module.weight).dim() - 2
    return Geometry(channels, channels, (1,) * sides).point(channels, channels, groups)


def _is_normed(coupling: Coupling, produced: Vector) -> bool:
    statistics = (classes for (name, _), classes in coupling.locations.items() if name.endswith("running_mean"))
    return any(np.isin(produced, classes).any() for classes in statistics)
