"""Structural reparameterization: convolutions trained as several parallel ones, and merged into one afterwards.

`expand` gives each convolution parallel branches, each with a BatchNorm of its own, without changing what the network
computes; the network is then trained as any other; `reparameterize` merges the branches, which are linear in evaluation
mode, into one convolution again. A BatchNorm that follows the convolution stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, as_calls, explain_inputs
from lightning_compress.edits import Edit, Replace, Spec, apply_edits, build, describe
from lightning_compress.layers import Chain, Sum
from lightning_compress.methods.calibration import visit
from lightning_compress.methods.geometry import Geometry
from lightning_compress.methods.replaceable import Layer, Layers, find_layers
from lightning_compress.wording import require_choice

__all__ = ["Kind", "expand", "reparameterize"]

Kind = Literal["repvgg", "dbb"]
"""Which branches a convolution gets."""


@dataclass(frozen=True)
class Branch:
    """One of the parallel branches: convolutions without biases in a row, then a BatchNorm.

    Attributes:
        convolutions: the layers; none: the branch is the input itself.
        weights: theirs, canonical, in double precision.
        scale: what the BatchNorm multiplies by, [outputs]; None: 1.
    """

    convolutions: tuple[Geometry, ...]
    weights: tuple[Tensor, ...]
    scale: Tensor | None = None

    def kernel(self, whole: Geometry) -> Tensor:
        """The canonical kernel of a layer `whole` that does the same, before the scale."""
        if not self.convolutions:
            unit = torch.eye(whole.inputs, dtype=torch.float64).view(whole.inputs, whole.inputs, *_ones(whole))
        else:
            unit = _dense(self.convolutions[0], self.weights[0])
        for geometry, weight in zip(self.convolutions[1:], self.weights[1:], strict=True):
            unit = torch.einsum("om...,mc->oc...", _dense(geometry, weight), unit.flatten(1))  # the first has one tap
        if math.prod(unit.shape[2:]) < math.prod(whole.kernel):
            centred = unit.new_zeros(*unit.shape[:2], math.prod(whole.kernel))
            centred[..., math.prod(whole.kernel) // 2] = unit.flatten(1).view(unit.shape[:2])
            unit = centred.unflatten(2, whole.kernel)
        groups, outputs, inputs = whole.shape[:3]
        blocks = unit.view(groups, outputs, groups, inputs, *whole.kernel)
        return torch.stack([blocks[g, :, g] for g in range(groups)])


@explain_inputs
def expand(model: nn.Module, inputs: Tensor | Call | Sequence[Any], kind: Kind = "repvgg") -> tuple[Edit, ...]:
    """Give the convolutions of a network parallel branches; what it computes stays the same.

    For a kernel W, the new branches start with parts of W (half of its middle tap, say), so that weights and gradients
    have ordinary sizes, and the branch with the whole kernel takes what remains. The BatchNorm of each branch starts
    with the statistics of the branch on `inputs` and gives back what it gets: so in training mode too, the network
    starts near where it was.

    Args:
        model: the network, changed in place.
        inputs: a few hundred unlabelled samples, as the network takes them.
        kind: "repvgg": k x k, 1 x 1 and, where input and output have the same shape, the input itself (Ding et al.
            2021, 'RepVGG: making VGG-style ConvNets great again', arXiv 2101.03697). "dbb": k x k, 1 x 1, 1 x 1 then
            k x k, and 1 x 1 then an average, whose kernel is trained too (Ding et al. 2021, 'Diverse branch block:
            building a convolution as an Inception-like unit', arXiv 2103.13425; without a BatchNorm inside of a
            branch, so that borders merge exactly).

    Returns:
        What was done.

    Raises:
        ValueError: another kind, or no convolution with a middle tap that is aligned with the output.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(16, 3, 8, 8)
        >>> before = net(x)
        >>> _ = expand(net, x)
        >>> torch.allclose(net(x), before, atol=1e-5), len(net[0])
        (True, 2)
    """
    require_choice("kind", kind, get_args(Kind))
    calls = as_calls(inputs)
    layers = find_layers(model, calls, {})
    # branches end in BatchNorm, which has no transpose
    chosen = {layer.path: layer for layer in layers.found if _aligned(layer.geometry) and not layer.downward}
    if not chosen:
        raise ValueError("the network has no convolution of more than one tap that parallel branches can be given")
    branches = {path: _branches(kind, layer.geometry, layer.weight.cpu()) for path, layer in chosen.items()}
    specs = {path: _spec(model, layer, branches[path], kind) for path, layer in chosen.items()}
    modules = {
        path: cast(Sum, build(specs[path], cast(Tensor, model.get_submodule(path).weight).detach())) for path in chosen
    }
    with torch.no_grad():
        for path, module in modules.items():
            for chain, branch in zip(module, branches[path], strict=True):
                for part, geometry, weight in zip(
                    cast(Chain, chain), branch.convolutions, branch.weights, strict=False
                ):
                    cast(Tensor, part.weight).copy_(geometry.native(weight))
        statistics = _measure(model, layers, modules, calls)
        for path, layer in chosen.items():
            for number, (chain, branch) in enumerate(zip(modules[path], branches[path], strict=True)):
                norm = cast(nn.BatchNorm2d, cast(Chain, chain)[-1])
                _give_back(norm, *statistics[path][number], branch.scale, None if number else layer.bias)
        edit = Replace({path: (layer.spec, specs[path]) for path, layer in chosen.items()}, f"expand({kind!r})")
        apply_edits(model, [edit])
        for path, module in modules.items():
            model.get_submodule(path).load_state_dict(module.state_dict())
    return (edit,)


def reparameterize(model: nn.Module) -> tuple[Edit, ...]:
    """Merge the branches that `expand` made into one convolution each; outputs in evaluation mode stay the same.

    Args:
        model: the network, changed in place.

    Returns:
        What was done; nothing, if there were no such branches.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> x = torch.randn(16, 8, 8, 8)
        >>> _ = expand(net, x, kind="dbb")
        >>> before = net.train()(x), net.eval()(x)  # statistics move on
        >>> _ = reparameterize(net)
        >>> torch.allclose(net(x), before[1], atol=1e-5), net[0]
        (True, Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)))
    """
    merged = {path: _merge(module) for path, module in model.named_modules() if _expanded(module)}
    if not merged:
        return ()
    edit = Replace(
        {
            path: (cast(Spec, describe(model.get_submodule(path))), geometry.spec)
            for path, (geometry, _, _) in merged.items()
        },
        "reparameterize()",
    )
    apply_edits(model, [edit])
    with torch.no_grad():
        for path, (geometry, kernel, bias) in merged.items():
            module = model.get_submodule(path)
            cast(Tensor, module.weight).copy_(geometry.native(kernel))
            cast(Tensor, module.bias).copy_(bias)
    return (edit,)


def _ones(geometry: Geometry) -> tuple[int, ...]:
    return (1,) * len(geometry.kernel)


def _dense(geometry: Geometry, weight: Tensor) -> Tensor:
    """A canonical weight without groups, [outputs, inputs, *k]."""
    groups, outputs, inputs = geometry.shape[:3]
    dense = weight.new_zeros(groups, outputs, groups, inputs, *geometry.kernel)
    for g in range(groups):
        dense[g, :, g] = weight[g]
    return dense.flatten(2, 3).flatten(0, 1)


def _aligned(geometry: Geometry) -> bool:
    """Whether it is a convolution whose middle tap is on the output's pixel."""
    if geometry.transposed or math.prod(geometry.kernel) == 1 or not all(side % 2 for side in geometry.kernel):
        return False
    middle = tuple(d * (k // 2) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    return geometry.padding in ("same", middle)


def _branches(kind: Kind, whole: Geometry, weight: Tensor) -> list[Branch]:
    """The branches of a layer, the one with the whole kernel first."""
    taps = math.prod(whole.kernel)
    middle = weight.flatten(3)[..., taps // 2]
    shape = (*middle.shape, *_ones(whole))
    point = replace(whole.point(whole.inputs, whole.outputs, whole.groups), stride=whole.stride)
    others = [Branch((point,), (middle.view(shape) / 2,))]
    if kind == "repvgg" and whole.inputs == whole.outputs and all(side == 1 for side in whole.stride):
        others.append(Branch((), (), middle.diagonal(dim1=1, dim2=2).flatten() / 4))
    if kind == "dbb":
        first = whole.point(whole.inputs, whole.inputs, whole.groups)
        unit = torch.eye(whole.shape[2], dtype=weight.dtype).expand(whole.groups, -1, -1)
        kernel = replace(whole, bias=False)
        others.append(Branch((first, kernel), (unit.reshape(*unit.shape, *_ones(whole)), weight / 4)))
        mean = whole.like(whole.outputs, whole.outputs, whole.outputs)
        first = whole.point(whole.inputs, whole.outputs, whole.groups)
        average = torch.full(mean.shape, 1 / taps, dtype=weight.dtype)
        others.append(Branch((first, mean), (weight.flatten(3).sum(3).view(shape) / 4, average)))
    rest = weight.clone()
    for branch in others:
        kernel_of = branch.kernel(whole)
        if branch.scale is not None:
            kernel_of = kernel_of * branch.scale.view(whole.groups, -1, *[1] * (kernel_of.dim() - 2))
        rest -= kernel_of
    return [Branch((replace(whole, bias=False),), (rest,)), *others]


def _spec(model: nn.Module, layer: Layer, branches: Sequence[Branch], kind: Kind) -> Spec:
    behind = None if layer.norm is None else cast(nn.BatchNorm2d, model.get_submodule(layer.norm))
    norm = {
        "type": f"BatchNorm{len(layer.geometry.kernel)}d",
        "num_features": layer.geometry.outputs,
        "eps": 1e-5 if behind is None else behind.eps,
        "momentum": 0.1 if behind is None else behind.momentum,
        "affine": True,
        "track_running_stats": True,
    }
    chains = [
        {"type": "Chain", "form": kind, "layers": (*(part.spec for part in branch.convolutions), norm)}
        for branch in branches
    ]
    return {"type": "Sum", "layers": tuple(chains)}


def _measure(
    model: nn.Module, layers: Layers, modules: Mapping[str, Sum], calls: Sequence[Call]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Mean and variance of what reaches the BatchNorm of each branch."""
    sums: dict[str, list[Tensor]] = {path: [] for path in modules}

    def see(path: str, x: Tensor, _: Tensor) -> None:
        new = []
        for chain in modules[path]:
            out = x
            for part in list(cast(Chain, chain))[:-1]:
                out = part(out)
            values = out.transpose(0, 1).flatten(1).double()
            new.append(
                torch.stack([values.new_full((len(values),), values.shape[1]), values.sum(1), (values**2).sum(1)])
            )
        sums[path] = [a + b for a, b in zip(sums[path], new, strict=True)] if sums[path] else new

    visit(model, layers, list(modules), calls, see)
    return {
        path: [(total[1] / total[0], total[2] / total[0] - (total[1] / total[0]).square()) for total in totals]
        for path, totals in sums.items()
    }


def _give_back(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Set a BatchNorm so that it gives back what it gets, times a scale, plus a bias."""
    running_mean, running_var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    running_mean.copy_(mean)
    running_var.copy_(variance.clamp_min(0.0))
    factor = torch.ones_like(mean) if scale is None else scale.to(mean)
    norm.weight.copy_((running_var.double() + norm.eps).sqrt() * factor)
    norm.bias.copy_(running_mean.double() * factor + (0.0 if bias is None else bias.double()))


def _expanded(module: nn.Module) -> bool:
    """Whether a module is what `expand` puts in the place of a convolution."""
    if type(module) is not Sum:
        return False
    return all(isinstance(chain, Chain) and chain.form in get_args(Kind) for chain in module)


def _merge(module: nn.Module) -> tuple[Geometry, Tensor, Tensor]:
    """The one convolution that branches amount to: what it is, its canonical kernel and its bias."""
    chains = [cast(Chain, chain) for chain in cast(Sum, module)]
    whole = replace(cast(Geometry, Geometry.of(chains[0][0])), bias=True)
    kernel, bias = torch.zeros(whole.shape, dtype=torch.float64), torch.zeros(whole.outputs, dtype=torch.float64)
    for chain in chains:
        *parts, norm = chain.children()
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        geometries = tuple(cast(Geometry, Geometry.of(part)) for part in parts)
        weights = tuple(
            geometry.canonical(cast(Tensor, part.weight).detach().double().cpu())
            for geometry, part in zip(geometries, parts, strict=True)
        )
        mean, variance, weight, shift = (
            cast(Tensor, value).detach().double().cpu()
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        scale = weight / (variance + norm.eps).sqrt()
        kernel += Branch(geometries, weights).kernel(whole) * scale.view(whole.groups, -1, *[1] * (kernel.dim() - 2))
        bias += shift - mean * scale
    return whole, kernel, bias
