"""What each aten op does to the labels of its arguments: arithmetic on elements, norms and reductions.

Arithmetic and products (`products.py`) unite, movement (`movement.py`) rearranges, and an op without a rule freezes
everything it touches: an op nobody has taught costs compression, never correctness. A rule must carry, unite or freeze
each labelled dim of each argument; a dim it drops without a word would be a hole in the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coupling.labels import Labels, Vector
from lightning_compress.coupling.trace import Op, Tracer

__all__ = ["RULES", "Rule", "label_outputs", "rule"]

Rule = Callable[[Tracer, Op], Sequence[Labels]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops, by name without overload; in-place variants (`relu_`) share it."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def label_outputs(tracer: Tracer, op: Op) -> list[Labels]:
    """The labels of what `op` returned, by the rule of its name; without one, its arguments are frozen."""
    name = op.name
    if name in _CONSTANTS:
        return [{d: tracer.space.new(n) for d, n in enumerate(out.shape) if n > 1} for out in op.outs]
    if not any(op.inputs) and name not in _PRODUCTS:
        return [{} for _ in op.outs]
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and _pointwise(op):
        found = elementwise
    if found is None:
        for labels in op.inputs:
            tracer.freeze(labels, f"reaches {op.where}, for which there is no rule")
        return [{} for _ in op.outs]
    outputs = list(found(tracer, op))
    return outputs + [{}] * (len(op.outs) - len(outputs))


_CONSTANTS = ("zeros", "ones", "full", "empty")
"""All elements alike; the sizes may follow the channels they meet: whether they do is for the proof to say."""


_PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "_fft_r2c", "_fft_c2r", "_fft_c2c")
"""What has a cost even where there is no label."""


def _pointwise(op: Op) -> bool:
    if torch.Tag.pointwise in op.func.tags:
        return True
    # In-place overloads are not all tagged; what they do is what their functional twin does.
    twin = getattr(torch.ops.aten, op.name.removesuffix("_"), None)
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads())


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor argument; () for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def size(value: Tensor, dim: int) -> int:
    """The size of a dim as a plain integer."""
    return int(value.shape[dim])


def broadcast(tracer: Tracer, op: Op, tensors: Sequence[Tensor], shape: Sequence[int]) -> Labels:
    """Labels of an elementwise result of `shape`: aligned from the last dim, united where several meet."""
    labels: Labels = {}
    for dim, extent in enumerate(shape):
        meeting: list[Vector | None] = []
        for tensor in tensors:
            own = dim - len(shape) + tensor.dim()
            if own < 0:
                continue
            vector = tracer.of(tensor).get(own)
            if tensor.shape[own] == extent and extent > 1:
                meeting.append(vector)
            elif vector is not None:
                tracer.space.freeze(vector, f"is broadcast by {op.where}")
        joined = tracer.join(op, *meeting)
        if joined is not None:
            labels[dim] = joined
    return labels


@rule("_to_copy", "_prelu_kernel", "native_dropout", "alias", "detach", "lift_fresh", "hardswish", "hardtanh", "copy",
      "rrelu_with_noise", "bernoulli", "masked_fill", "fill", "zero", "normal", "uniform", "contiguous",
      "dropout")  # fmt: skip
def elementwise(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Ops that work on each element alone."""
    tensors = [a for a in (*op.args, *op.kwargs.values()) if isinstance(a, Tensor)]
    tensors += [a for group in op.args if isinstance(group, list | tuple) for a in group if isinstance(a, Tensor)]
    return [broadcast(tracer, op, tensors, out.shape) for out in op.outs]


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros",
      "new_ones", "new_full", "new_empty_strided")  # fmt: skip
def like(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Constants shaped after a tensor: taken to follow its sizes where they are the same."""
    source, out = op.args[0], op.outs[0]
    same = source.dim() == out.dim()
    follows = {d: v for d, v in tracer.of(source).items() if same and source.shape[d] == out.shape[d]}
    others = {d: n for d, n in enumerate(out.shape) if n > 1 and not (same and source.shape[d] == n)}
    return [follows | {d: tracer.space.new(n) for d, n in others.items()}]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """A direction and a length for each slice; the length is a norm over all other dims."""
    direction, length, dim = (*op.args, 0)[:3]
    labels = dict(tracer.of(direction))
    joined = tracer.join(op, labels.get(dim), tracer.of(length).get(dim)) if size(direction, dim) > 1 else None
    if joined is not None:
        labels[dim] = joined
    op.restricted = any(d != dim for d in labels)
    return [labels, {} if joined is None else {dim: joined}]


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm_with_update")  # fmt: skip
def batch_norm(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Batch norm: affine parameters and running statistics go with the channels."""
    x = op.args[0]
    labels = dict(tracer.of(x))
    vectors = [tracer.of(a).get(0) for a in op.args[1:] if isinstance(a, Tensor) and size(x, 1) > 1]
    joined = tracer.join(op, labels.get(1), *vectors) if size(x, 1) > 1 else None
    if joined is not None:
        labels[1] = joined
    op.restricted = any(d != 1 for d in labels)  # statistics over channels, as in weight standardisation
    statistics: Labels = {} if joined is None else {0: joined}
    return [labels, *(statistics if shape_of(out) == (size(x, 1),) else {} for out in op.outs[1:])]


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm")
def layer_norm(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Layer norm over the last dims: it stays a norm, over the channels that are left."""
    x, normalized = op.args[:2]
    labels = dict(tracer.of(x))
    first = x.dim() - len(normalized)
    for own in range(len(normalized)):
        affine = [a for a in op.args[2:4] if isinstance(a, Tensor)]
        if normalized[own] > 1:
            joined = tracer.join(op, labels.get(first + own), *(tracer.of(a).get(own) for a in affine))
            labels |= {} if joined is None else {first + own: joined}
    inside = [labels[d] for d in sorted(labels) if d >= first]
    op.restricted = bool(inside)
    if len(inside) == len(normalized):
        tracer.hold(op, "normalized_shape", *inside)
    elif inside:
        tracer.freeze(labels, f"part of the shape that {op.where} normalises", range(first, x.dim()))
    outer = {d: v for d, v in labels.items() if d < first}
    return [labels, *(outer for _ in op.outs[1:])]


@rule("native_group_norm")
def group_norm(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Group norm: with one group the norm goes on over the channels left; with several a group goes as a whole."""
    x, weight, bias, groups = op.args[0], op.args[1], op.args[2], op.args[6]
    labels = dict(tracer.of(x))
    vectors = [tracer.of(a).get(0) for a in (weight, bias) if a is not None]
    joined = tracer.join(op, labels.get(1), *vectors) if size(x, 1) > 1 else None
    tracer.freeze(labels, f"batch or space of {op.where}", [d for d in labels if d != 1])
    if joined is None:
        return [labels]
    statistics: Labels = {}
    if groups > 1:
        statistics = {1: tracer.repeat(joined.reshape(groups, -1).T)}
        tracer.hold(op, "num_groups", statistics[1])
    op.restricted = groups == 1
    return [labels | {1: joined}, statistics, statistics]


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
      "prod", "logsumexp", "any", "all", "argmax", "argmin", "nansum", "aminmax")  # fmt: skip
def reduction(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Reductions: over data, labels are carried; over channels, the op goes on over those that are left."""
    x = op.args[0]
    if op.name in ("max", "min") and len(op.args) > 1 and isinstance(op.args[1], Tensor):
        return elementwise(tracer, op)
    names = [argument.name for argument in op.func._schema.arguments]
    arguments = dict(zip(names, op.args, strict=False)) | op.kwargs
    given = arguments.get("dim")
    dims = list(range(x.dim())) if given in (None, []) else [given] if isinstance(given, int) else list(given)
    dims = [d % max(x.dim(), 1) for d in dims]
    labels = tracer.of(x)
    if any(d in labels for d in dims):
        if op.name in ("argmax", "argmin", "max", "min") and given is not None:  # the index of a channel is a number
            tracer.freeze(labels, f"is indexed by {op.where}", dims)
        op.restricted = True
    keepdim = bool(arguments.get("keepdim", False))
    kept = {d if keepdim else d - sum(r < d for r in dims): vector for d, vector in labels.items() if d not in dims}
    return [kept for _ in op.outs]


@rule("_softmax", "_log_softmax", "cumsum", "cumprod", "softmax", "log_softmax")
def along(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Ops that mix the elements of one dim and keep its size."""
    x, dim = op.args[0], op.args[1] % max(op.args[0].dim(), 1)
    tracer.freeze(tracer.of(x), f"{op.where} runs over it", [dim])
    return [tracer.of(x) for _ in op.outs]


def spatial(rank: int) -> Rule:
    """Ops that work on the last `rank` dims and leave those before alone."""

    def apply(tracer: Tracer, op: Op) -> Sequence[Labels]:
        tensors = [a for a in op.args if isinstance(a, Tensor) and a.dim() == op.args[0].dim()]
        for tensor in tensors:
            last = range(tensor.dim() - rank, tensor.dim())
            tracer.freeze(tracer.of(tensor), f"space of {op.where}", last)
        labels: Labels = {}
        for dim in range(op.args[0].dim() - rank):
            if op.args[0].shape[dim] > 1:
                joined = tracer.join(op, *(tracer.of(t).get(dim) for t in tensors))
                labels |= {} if joined is None else {dim: joined}
        return [labels for _ in op.outs]

    return apply


for _rank, _names in {
    1: ("avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "max_pool1d", "upsample_linear1d",
        "upsample_nearest1d", "reflection_pad1d", "replication_pad1d"),
    2: ("avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
        "adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
        "upsample_bicubic2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d", "max_unpool2d",
        "fractional_max_pool2d"),
    3: ("avg_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool3d", "_adaptive_avg_pool3d",
        "adaptive_max_pool3d", "upsample_nearest3d", "upsample_trilinear3d", "replication_pad3d", "max_unpool3d"),
}.items():  # fmt: skip
    rule(*_names)(spatial(_rank))
