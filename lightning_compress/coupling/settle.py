"""Plan, prove, and plan again: from a wish to an edit that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_compress.coupling.graph import Coupling, Mask
from lightning_compress.coupling.labels import DATA, Vector
from lightning_compress.coupling.proof import Fault, Proof, prove
from lightning_compress.coupling.trace import Op
from lightning_compress.edits import Attribute, Keep
from lightning_compress.waiting import working

__all__ = ["Settled", "settle"]

_MOVEMENT = ("view", "_unsafe_view", "reshape", "split", "split_with_sizes", "slice", "expand", "narrow", "unbind")


@dataclass(frozen=True)
class Settled:
    """An edit that was proved.

    Attributes:
        keep: the edit.
        cut: the classes it removes.
        proof: the verdict, `exact` or `restricted`.
    """

    keep: Keep
    cut: Mask
    proof: Proof


def settle(coupling: Coupling, choose: Callable[[Coupling], Mask], origin: str = "") -> Settled | None:
    """Choose what to cut, prove it on a trial copy, and repair or freeze until the proof holds.

    Args:
        coupling: the traced network; what proves uncuttable is frozen in it, with the reason.
        choose: picks the classes to cut; called again after every freeze.
        origin: the method that asks, for the record.

    Returns:
        The proved edit; None when nothing (more) can be cut.
    """
    last: tuple[int, list[tuple[str, str]]] | None = None
    while True:
        cut = choose(coupling)
        if not cut.any():
            return None
        keep = coupling.keep_edit(cut, origin)
        with working("proving the cut: what is left must compute the same"):
            proof = prove(coupling, keep, cut)
        fault = proof.fault
        if fault is None:
            return Settled(keep, cut, proof)
        if last is not None and fault.index <= last[0]:  # the repair did not help
            for key in last[1]:
                del coupling.repaired[key]
            last = None
        else:
            repaired = _repair(coupling, fault, cut)
            if repaired:
                last = (fault.index, repaired)
                continue
        _freeze(coupling, fault, cut)


def _repair(coupling: Coupling, fault: Fault, cut: Mask) -> list[tuple[str, str]]:
    """Find the sizes that modules hold in Python and that the op at fault depends on; their siblings hold the same."""
    if fault.index >= len(coupling.ops):
        return []
    repaired: list[tuple[str, str]] = []
    for op in _siblings(coupling, coupling.ops[fault.index]):
        repaired += _hold(coupling, op.module, dict(_sizes(coupling, op, cut)))
    return repaired


def _sizes(coupling: Coupling, op: Op, cut: Mask) -> Iterator[tuple[Attribute, tuple[Vector, ...]]]:
    """Sizes that change around an op, and the labels they count: of what it made first, then of what it was given."""
    for dim in {dim for labels in op.outputs for dim in labels}:
        parts = tuple(labels[dim] for labels in op.outputs if dim in labels)
        if len(parts) > 1:  # a list of sizes, as `split` takes it
            yield tuple(len(part) for part in parts), parts
    for shape, labels in zip(op.shapes, op.outputs, strict=True):  # a whole shape, as `view` takes it
        if any(not coupling.alive(vector, cut).all() for vector in labels.values()):
            yield shape, tuple(labels.get(dim, np.full(size, DATA)) for dim, size in enumerate(shape))
    for labels in (*op.inputs, *op.outputs):  # later ones win: what was made
        for vector in labels.values():
            if not coupling.alive(vector, cut).all():
                yield len(vector), (vector,)


def _hold(coupling: Coupling, path: str, sizes: Mapping[Attribute, tuple[Vector, ...]]) -> list[tuple[str, str]]:
    """Let the attributes that hold one of `sizes` follow: of the module at `path`, or else of the nearest around it."""
    while True:
        found = []
        for name, value in vars(coupling.model.get_submodule(path)).items():
            key = (path, name)
            known = tuple(value) if isinstance(value, list) else value
            plain = type(known) is int or (type(known) is tuple and all(type(v) is int for v in known))
            if plain and not name.startswith("_") and known in sizes and key not in coupling.repaired:
                coupling.repaired[key] = (known, sizes[known])
                found.append(key)
        if found or not path:
            return found
        path = path.rpartition(".")[0]


def _siblings(coupling: Coupling, op: Op) -> Iterator[Op]:
    """The op, and if it moves data in a module of the user's, the same op in the other modules of that class."""
    yield op
    kind = type(coupling.model.get_submodule(op.module))
    if op.name in _MOVEMENT and op.module:
        for other in coupling.ops:
            same = other is not op and other.func is op.func and other.module != op.module
            if same and type(coupling.model.get_submodule(other.module)) is kind:
                yield other


def _freeze(coupling: Coupling, fault: Fault, cut: Mask) -> None:
    """Freeze what flows through the op at fault; where nothing that was cut does, what flows through the nearest."""
    ops = coupling.ops
    start = min(fault.index, len(ops) - 1)
    nearest = [*range(start, -1, -1), *range(start + 1, len(ops))]
    for index in nearest:
        op = ops[index]
        if any(not coupling.alive(vector, cut).all() for vector in op.vectors()):
            stuck = [coupling.classes[vector] for sibling in _siblings(coupling, op) for vector in sibling.vectors()]
            coupling.freeze(stuck, f"{op.where} does not follow a change of size: {fault.message}")
            return
    raise AssertionError("an edit that touches no op cannot fail")  # what is cut is used: `Tracer.finish`
