"""What each aten op does to the labels of its arguments: products, which unite what they sum over.

Here are the multiply-accumulates too: each product records what it costs in terms of the channels that live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from lightning_compress.coupling.labels import KERNEL, Labels, Vector
from lightning_compress.coupling.rules import rule, size
from lightning_compress.coupling.trace import Op, Tracer
from lightning_compress.meter import COMPLEX, fft_macs

__all__: list[str] = []


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
def convolution(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Convolution, transposed or not, of any rank and number of groups."""
    x, weight, bias = op.args[:3]
    transposed, groups, out = op.args[6], op.args[8], op.outs[0]
    x_labels, w_labels = tracer.of(x), tracer.of(weight)
    tracer.freeze(x_labels, f"batch or space of {op.where}", [0, *range(2, x.dim())])
    tracer.freeze(w_labels, KERNEL, range(2, weight.dim()))
    channels = x_labels.get(1)
    inner, outer = (0, 1) if transposed else (1, 0)  # weight is (out, in / groups, ...) or (in, out / groups, ...)
    w_in, w_out = w_labels.get(inner), w_labels.get(outer)
    in_group, out_group = size(x, 1) // groups, size(out, 1) // groups
    if groups == 1:
        if size(x, 1) > 1:
            tracer.join(op, channels, w_in)
        produced = w_out
    elif in_group == 1 or out_group == 1:
        produced = _whole_groups(tracer, op, channels, w_in, w_out)
    else:
        produced = _balanced_groups(tracer, op, channels, w_in, w_out)
    if bias is not None and size(out, 1) > 1:
        produced = tracer.join(op, produced, tracer.of(bias).get(0))
    space = x if transposed else out
    positions = size(x, 0) * math.prod(space.shape[2:]) * math.prod(weight.shape[2:])
    tracer.count(positions, (w_labels.get(0), size(weight, 0)), (w_labels.get(1), size(weight, 1)))
    return [{} if produced is None else {1: produced}]


def _whole_groups(
    tracer: Tracer, op: Op, channels: Vector | None, w_in: Vector | None, w_out: Vector | None
) -> Vector | None:
    """Depthwise and its kin: a group has one channel on one side, so a group goes as a whole."""
    weight, transposed, groups = op.args[1], op.args[6], op.args[8]
    if transposed:  # (in, out / groups): the dim of the outputs is shared by all groups and stays
        if w_out is not None:
            tracer.space.freeze(w_out, f"shared by all groups of {op.where}")
        grouped, per_group = w_in, size(weight, 0) // groups
    else:
        if w_in is not None:
            tracer.space.freeze(w_in, f"shared by all groups of {op.where}")
        grouped, per_group = w_out, size(weight, 0) // groups
    if channels is None or grouped is None:
        tracer.join(op, *(v for v in (channels, grouped) if v is not None), None)
        return None
    own = tracer.repeat(grouped.reshape(groups, per_group).T)
    met = tracer.repeat(channels.reshape(groups, -1).T)
    tracer.space.unite(own, met)
    tracer.hold(op, "groups", met)
    if transposed:
        return met.repeat(size(op.outs[0], 1) // groups)
    return grouped


def _balanced_groups(
    tracer: Tracer, op: Op, channels: Vector | None, w_in: Vector | None, w_out: Vector | None
) -> Vector | None:
    """The number of groups stays; each loses the same channels, so the groups are united position by position."""
    transposed, groups = op.args[6], op.args[8]
    produced: Vector | None
    if transposed:  # weight (in, out / groups)
        first = None if w_in is None else tracer.repeat(w_in.reshape(groups, -1))
        produced = None if w_out is None else np.tile(w_out, groups)
    else:  # weight (out, in / groups)
        first = w_in
        if w_out is not None:
            tracer.repeat(w_out.reshape(groups, -1))
        produced = w_out
    tracer.join(op, first, None if channels is None else tracer.repeat(channels.reshape(groups, -1)))
    return produced


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")
def matmul(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Matrix products: what is summed over is united, the rest is carried; a bias broadcasts onto the result."""
    bias, (a, b) = (op.args[0], op.args[1:3]) if op.name in ("addmm", "baddbmm", "addmv") else (None, op.args[:2])
    a_labels, b_labels, out = tracer.of(a), tracer.of(b), op.outs[0]
    inner_a, inner_b = a.dim() - 1, max(b.dim() - 2, 0)
    if size(a, inner_a) > 1:
        tracer.join(op, a_labels.get(inner_a), b_labels.get(inner_b))
    labels: Labels = {}
    if a.dim() == 3 and size(a, 0) > 1:
        batch = tracer.join(op, a_labels.get(0), b_labels.get(0))
        labels |= {} if batch is None else {0: batch}
    if a.dim() > 1 and a.dim() - 2 in a_labels:
        labels[a.dim() - 2] = a_labels[a.dim() - 2]
    if b.dim() > 1 and b.dim() - 1 in b_labels:
        labels[out.dim() - 1] = b_labels[b.dim() - 1]
    factors = [(a_labels.get(d), size(a, d)) for d in range(a.dim())]
    if b.dim() > 1:
        factors.append((b_labels.get(b.dim() - 1), size(b, b.dim() - 1)))
    tracer.count(float(COMPLEX if a.is_complex() else 1), *factors)
    if bias is not None:
        _add_bias(tracer, op, labels, bias)
    return [labels]


def _add_bias(tracer: Tracer, op: Op, labels: Labels, bias: Tensor) -> None:
    out = op.outs[0]
    for own, vector in tracer.of(bias).items():
        dim = own - bias.dim() + out.dim()
        joined = tracer.join(op, labels.get(dim), vector)
        if joined is not None:
            labels[dim] = joined
    for dim, vector in labels.items():
        own = dim - out.dim() + bias.dim()
        if own >= 0 and bias.shape[own] > 1 and own not in tracer.of(bias):
            tracer.join(op, vector, None)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def attention(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Fused attention: only the value's channels can go; the scale may depend on those of query and key."""
    query, key, value = op.args[:3]
    tracer.freeze(tracer.of(query), f"query of {op.where}")
    tracer.freeze(tracer.of(key), f"key of {op.where}")
    tracer.freeze(tracer.of(value), f"heads or tokens of {op.where}", [0, 1, 2])
    pairs = math.prod(query.shape[:-1]) * size(key, -2)
    tracer.count(pairs, (None, size(query, -1)))
    tracer.count(pairs, (tracer.of(value).get(3), size(value, -1)))
    return [{d: v for d, v in tracer.of(value).items() if d == 3}]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def transform(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Fourier transforms: nothing that goes through one is followed."""
    x, dims, out = op.args[0], op.args[1], op.outs[0]
    tracer.freeze(tracer.of(x), f"is transformed by {op.where}")
    whole = out if x.is_complex() else x
    length = math.prod(size(whole, dim) for dim in dims)
    macs = fft_macs(whole.numel(), length, real=not (x.is_complex() and out.is_complex()))
    tracer.count(macs, once=isinstance(x, nn.Parameter))
    return [{}]


@rule("embedding")
def embedding(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Rows taken from a table: its columns are channels."""
    weight, out = op.args[0], op.outs[0]
    tracer.freeze(tracer.of(weight), f"rows of {op.where}", [0])
    return [{out.dim() - 1: v for d, v in tracer.of(weight).items() if d == 1}]
