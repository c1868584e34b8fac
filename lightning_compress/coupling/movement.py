"""What each aten op does to the labels of its arguments: data movement.

Most of it is executed literally: the op runs on a tensor that holds labels instead of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.coupling.labels import DATA, Labels, Vector
from lightning_compress.coupling.rules import rule
from lightning_compress.coupling.trace import Op, Tracer

__all__: list[str] = []


def grid_of(vector: Vector, dim: int, shape: Sequence[int]) -> Tensor:
    """A tensor of `shape` whose elements are the labels of the index they have in `dim`.

    Labels are held in float64, exact up to 2^53, because not every data movement has an integer kernel.
    """
    view = [1] * len(shape)
    view[dim] = -1
    return torch.from_numpy(vector.astype(np.float64)).view(view).expand(*shape)


def literal(tracer: Tracer, op: Op, channel: int | None = None, labels: Labels | None = None) -> list[Labels]:
    """Run `op` on the labels of its first argument, one labelled dim at a time."""
    source = op.args[0]
    outputs: list[Labels] = [{} for _ in op.outs]
    for dim, vector in (tracer.of(source) if labels is None else labels).items():
        grid = grid_of(vector, dim, source.shape)
        rest = pytree.tree_map_only(Tensor, lambda t: t.cpu(), (op.args[1:], op.kwargs))
        kwargs = {k: v for k, v in rest[1].items() if k not in ("device", "dtype", "layout", "memory_format")}
        moved = op.func(grid, *rest[0], **kwargs)
        _place_all(
            tracer, op, outputs, [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, Tensor)], channel
        )
    return outputs


def _place_all(tracer: Tracer, op: Op, outputs: list[Labels], moved: list[Tensor], channel: int | None = None) -> None:
    for labels, grid in zip(outputs, moved, strict=True):
        for dim, vector in tracer.place(op, grid.numpy().astype(np.int64), channel).items():
            known = labels.get(dim)
            if known is not None:  # two dims in one, and an element has one label: the one of the larger dim
                known, vector = sorted((known, vector), key=lambda v: len(np.unique(v)))
                tracer.space.freeze(known, f"is merged with other channels by {op.where}")
            labels[dim] = vector


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Another shape over the same elements."""
    source, out = op.args[0], op.outs[0]
    labels: Labels = {}
    for dim, vector in tracer.of(source).items():
        same = _same_dim(tuple(source.shape), dim, tuple(out.shape))
        if same is not None and same not in labels:
            labels[same] = vector
        else:
            _place_all(tracer, op, [labels], [grid_of(vector, dim, source.shape).reshape(out.shape)])
    return [labels]


def _same_dim(shape: tuple[int, ...], dim: int, new: tuple[int, ...]) -> int | None:
    """The dim of the new shape that holds just what `dim` held, if there is one."""
    before = math.prod(shape[:dim])
    for candidate, extent in enumerate(new):
        if extent == shape[dim] and math.prod(new[:candidate]) == before:
            return candidate
    return None


@rule("flip", "repeat", "im2col", "unfold", "repeat_interleave", "squeeze", "unsqueeze", "diagonal", "slice_scatter")
def move(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Movement with no sizes that would change with the number of channels."""
    others = [a for a in (*op.args[1:], *op.kwargs.values()) if isinstance(a, Tensor)]
    for other in others:
        tracer.freeze(tracer.of(other), f"reaches {op.where}")
    if op.name.startswith(("squeeze", "unsqueeze")):
        return [_squeezed(tracer, op)]
    if op.name == "unfold":
        tracer.freeze(tracer.of(op.args[0]), f"windows of {op.where}", [op.args[1] % op.args[0].dim()])
    return literal(tracer, op)


def _squeezed(tracer: Tracer, op: Op) -> Labels:
    source, out = op.args[0], op.outs[0]
    labels: Labels = {}
    for dim, vector in tracer.of(source).items():
        same = _same_dim(tuple(source.shape), dim, tuple(out.shape))
        assert same is not None  # a labelled dim has more than one index, and is not squeezed
        labels[same] = vector
    return labels


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Channels to space and back: what lands in one channel goes together."""
    return literal(tracer, op, channel=op.args[0].dim() - 3)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """(groups, channels) transposed: each group must lose the same channels."""
    vector = tracer.of(op.args[0]).get(1)
    if vector is not None:
        tracer.repeat(vector.reshape(op.args[1], -1))
    return literal(tracer, op)


@rule("permute", "transpose", "t", "expand", "broadcast_to")
def permute(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Dims in another order, or new ones in front."""
    source, out = op.args[0], op.outs[0]
    labels = tracer.of(source)
    if op.name in ("expand", "broadcast_to"):
        return [{dim + out.dim() - source.dim(): vector for dim, vector in labels.items()}]
    order = list(range(source.dim()))
    if op.name == "permute":
        order = [d % source.dim() for d in op.args[1]]
    elif source.dim() > 1:
        a, b = (d % source.dim() for d in op.args[1:3]) if op.name.startswith("transpose") else (0, 1)
        order[a], order[b] = order[b], order[a]
    return [{order.index(dim): vector for dim, vector in labels.items()}]


@rule("slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "select", "split_copy", "unsafe_split")
def slices(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Parts of a tensor. Equal parts are united: code that halves a tensor goes on halving it."""
    source = op.args[0]
    names = [argument.name for argument in op.func._schema.arguments]
    arguments = dict(zip(names, op.args, strict=False)) | op.kwargs
    cut = int(arguments.get("dim", 0)) % source.dim()
    vector = tracer.of(source).get(cut)
    removed = op.name in ("select", "unbind")
    outputs: list[Labels] = []
    start = 0
    for out in op.outs:
        labels = {d - (removed and d > cut): v for d, v in tracer.of(source).items() if d != cut}
        if vector is not None and removed:
            tracer.space.freeze(vector, f"is taken out alone by {op.where}")
        elif vector is not None:
            part = vector
            if op.name == "slice":
                first, step = arguments.get("start") or 0, arguments.get("step", 1)
                first = first + len(vector) if first < 0 else first
                part = vector[first::step][: out.shape[cut]]
                if step > 1:
                    tracer.space.freeze(vector, f"every {step}th is taken by {op.where}")
            else:
                first, part = start, vector[start : start + out.shape[cut]]
            start += out.shape[cut]
            whole = len(part) and len(vector) % len(part) == 0 and first % len(part) == 0
            if whole and 1 < len(part) < len(vector):
                tracer.repeat(vector.reshape(-1, len(part)))
            if len(part) == 1 and len(vector) > 1:
                tracer.space.freeze(part, f"is taken out alone by {op.where}")
            elif len(part):
                labels[cut] = part
        outputs.append(labels)
    return outputs


@rule("cat", "stack", "concatenate")
def cat(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Tensors end to end: along the dim, labels end to end; along the others, united."""
    tensors: list[Tensor] = [t for t in op.args[0] if t.dim() > 0 and t.numel()]
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    dim, out = given % op.outs[0].dim(), op.outs[0]
    stacked = op.name == "stack"
    labels: Labels = {}
    for d in range(out.dim()):
        if d == dim:
            continue
        own = d - (stacked and d > dim)
        if out.shape[d] > 1:
            joined = tracer.join(op, *(tracer.of(t).get(own) for t in tensors))
            labels |= {} if joined is None else {d: joined}
    if not stacked and any(dim in tracer.of(t) for t in tensors):
        data = [np.full(t.shape[dim], DATA, dtype=np.int64) for t in tensors]
        labels[dim] = np.concatenate([tracer.of(t).get(dim, blank) for t, blank in zip(tensors, data, strict=True)])
    return [labels]


@rule("constant_pad_nd")
def pad(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Constants around a tensor; between padded channels those that are there may go."""
    source, amounts = op.args[0], op.args[1]
    labels: Labels = {}
    for dim, vector in tracer.of(source).items():
        behind = 2 * (source.dim() - 1 - dim)
        before, after = (amounts[behind], amounts[behind + 1]) if behind < len(amounts) else (0, 0)
        if before < 0 or after < 0:
            tracer.space.freeze(vector, f"is cropped by {op.where}")
        kept = vector[max(0, -before) : len(vector) - max(0, -after)]
        edges = [np.full(max(0, n), DATA, dtype=np.int64) for n in (before, after)]
        labels[dim] = np.concatenate([edges[0], kept, edges[1]])
    return [labels]


@rule("index_select", "index", "gather", "take_along_dim", "roll", "grid_sampler_2d", "grid_sampler_3d", "index_put",
      "masked_select")  # fmt: skip
def index(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Positions given as numbers: the dim they count along stays as it is, the others are carried."""
    source, out = op.args[0], op.outs[0]
    others: list[Any] = [leaf for leaf in pytree.tree_leaves((op.args[1:], op.kwargs)) if isinstance(leaf, Tensor)]
    for other in others:
        tracer.freeze(tracer.of(other), f"is an index of {op.where}")
    labels = tracer.of(source)
    if op.name.startswith("grid_sampler"):
        tracer.freeze(labels, f"space of {op.where}", range(2, source.dim()))
        return [{d: v for d, v in labels.items() if d == 1}]
    if op.name == "index_select":
        touched = [op.args[1] % source.dim()]
    elif op.name == "index":
        touched = [d for d, i in enumerate(op.args[1]) if i is not None]
    elif op.name == "roll":
        touched = [d % source.dim() for d in (op.args[2] if len(op.args) > 2 else op.kwargs.get("dims", ()))]
        touched = touched or list(range(source.dim()))
    else:
        touched = list(range(source.dim()))
    tracer.freeze(labels, f"is indexed by {op.where}", touched)
    carried = {d: v for d, v in labels.items() if d not in touched}
    if op.name == "index" and carried:
        return literal(tracer, op, labels=carried)
    return [{d: v for d, v in carried.items() if d < out.dim()}]


@rule("as_strided")
def as_strided(tracer: Tracer, op: Op) -> Sequence[Labels]:
    """Only what pooling does with it: the same shape in another memory format."""
    labels, out = tracer.of(op.args[0]), op.outs[0]
    known = {d: v for d, v in labels.items() if d < out.dim() and out.shape[d] == len(v)}
    if len(known) < len(labels) or tuple(op.args[1]) != tuple(op.args[0].shape):
        tracer.freeze(labels, f"reaches {op.where}, for which there is no rule")
        return [{}]
    return [known]
