"""The coupling of a network: which channels exist, what each costs, and the edit that removes a choice of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lightning_compress.calls import Call, as_calls, batch_size, resize_batch
from lightning_compress.coupling.costs import Mask, Products, volume
from lightning_compress.coupling.labels import KERNEL, Vector
from lightning_compress.coupling.trace import Tracer, module_stack
from lightning_compress.edits import Attribute, Keep
from lightning_compress.quiet import undisturbed
from lightning_compress.structured import Circulant

__all__ = ["Coupling", "Group", "Location", "Mask", "trace_coupling"]

Location = tuple[str, int]
"""A dim of a tensor: (name, dim)."""


@dataclass(frozen=True)
class Group:
    """Channels that live in the same dims of the same tensors: what pruning calls a layer.

    Attributes:
        name: the module that first produces them.
        classes: the channels, as indices into the coupling's classes.
        locations: the dims they live in.

    Example:
        >>> import torch
        >>> [group] = trace_coupling(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4)).groups
        >>> group.name, len(group.classes), group.locations
        ('0', 3, (('0.weight', 0), ('0.bias', 0), ('1.weight', 1)))
    """

    name: str
    classes: Vector
    locations: tuple[Location, ...]


class Coupling:
    """What `trace_coupling` found out.

    Attributes:
        model: the network that was traced.
        calls: the calls it was traced on.
        ops: the aten ops of the evaluation run, in order, with their labels.
        classes: the class of each label.
        frozen: for each class, whether it can never be cut.
        locations: for each dim of each tensor, the class of each index; tied tensors under their first name.
        groups: the channels that can be cut, layer by layer, in the order of the network.
        repaired: sizes that modules hold in Python, found by the proof: (module, attribute) -> (value, labels counted).

    Example:
        >>> import torch
        >>> coupling = trace_coupling(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4))
        >>> cut = coupling.nothing_cut()
        >>> cut[coupling.groups[0].classes[0]] = True
        >>> coupling.macs(coupling.nothing_cut()), coupling.macs(cut)
        (18.0, 12.0)
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], tracer: Tracer) -> None:
        """Solve what the tracer collected. Use `trace_coupling`.

        Args:
            model: the network.
            calls: the calls it was traced on.
            tracer: what followed them.
        """
        self.model, self.calls, self.ops = model, tuple(calls), tracer.ops
        self.repaired: dict[tuple[str, str], tuple[Attribute, tuple[Vector, ...]]] = {}
        self._held, self._tensors = tracer.attributes, tracer.tensors
        self.classes, self.frozen = tracer.space.solve()
        self.count = len(self.frozen)
        self._reasons = tracer.space.explain(self.classes)
        self.locations = self._incidence()
        self.groups = self._build_groups()
        batch = batch_size(self.calls)
        spent = [(cost.constant / (1 if cost.once else batch), cost.vectors) for cost in tracer.costs]
        self._macs = Products(self.classes, self.count, spent)
        sizes = list({id(t): (t, labels) for t, labels in self._tensors.values()}.values())
        weights = [(t, labels) for t, labels in sizes if isinstance(t, nn.Parameter)]
        self._params = Products(self.classes, self.count, [volume(t, labels, 1) for t, labels in weights])
        self._bytes = Products(self.classes, self.count, [volume(t, labels, t.element_size()) for t, labels in sizes])

    def _incidence(self) -> dict[Location, Vector]:
        """Where each class lives: for every location, the class of each index; tied names share one entry."""
        locations: dict[Location, Vector] = {}
        seen: set[int] = set()
        for name, (tensor, labels) in self._tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                locations |= {(name, dim): self.classes[vector] for dim, vector in labels.items()}
        return locations

    def _build_groups(self) -> list[Group]:
        rng = np.random.default_rng(0)
        keys = list(self.locations)
        signature = np.zeros(self.count, dtype=np.uint64)
        first = np.full(self.count, len(keys))
        order = np.zeros(self.count, dtype=np.int64)
        for index, key in reversed(list(enumerate(keys))):
            members = self.locations[key]
            signature[np.unique(members)] += rng.integers(1, 2**62, dtype=np.uint64)  # sums of random numbers: sets
            first[members] = index
            order[members] = np.arange(len(members))
        layers: list[Vector] = []
        alive = np.flatnonzero(~self.frozen & (first < len(keys)))
        for _, members in sorted(_group_by(signature[alive], alive), key=lambda item: first[item[1]].min()):
            members = members[np.argsort(order[members], kind="stable")]
            if len(members) < 2:  # the last channel of a layer always stays
                continue
            layers.append(members)
        places: dict[int, list[Location]] = {int(members[0]): [] for members in layers}
        sampled = np.zeros(self.count, dtype=bool)
        sampled[list(places)] = True
        for key in keys:  # one channel of a layer lives where all of them do
            for sample in np.unique(self.locations[key][sampled[self.locations[key]]]):
                places[int(sample)].append(key)
        found = [(members, tuple(places[int(members[0])])) for members in layers]
        return [Group(where[0][0].rpartition(".")[0], members, where) for members, where in found]

    def freeze(self, classes: Sequence[Vector], reason: str) -> None:
        """Never cut these classes; `reason` completes 'not cut: ...'."""
        members = np.unique(np.concatenate([*classes, np.empty(0, np.int64)]))
        for index in members[~self.frozen[members]]:
            self._reasons.setdefault(int(index), reason)
        self.frozen[members] = True
        self.groups = self._build_groups()

    @property
    def reasons(self) -> dict[str, str]:
        """Location (`fc.weight[0]`) -> why some or all of its indices are never cut."""
        reasons: dict[str, str] = {}
        for (name, dim), members in self.locations.items():
            stuck = members[self.frozen[members]]
            if len(stuck):
                known = [self._reasons[int(c)] for c in stuck if int(c) in self._reasons]
                if KERNEL not in known:
                    reasons[f"{name}[{dim}]"] = known[0] if known else "meets data, which has no channels"
        return reasons

    def nothing_cut(self) -> Mask:
        """A mask over the classes in which every channel stays."""
        return np.zeros(self.count, dtype=bool)

    def macs(self, cut: Mask) -> float:
        """Multiply-accumulates of one sample when the classes in `cut` are gone."""
        return self._macs(cut)

    def params(self, cut: Mask) -> float:
        """Number of parameters when the classes in `cut` are gone."""
        return self._params(cut)

    def bytes(self, cut: Mask) -> float:
        """Bytes of all parameters and buffers when the classes in `cut` are gone."""
        return self._bytes(cut)

    def alive(self, vector: Vector, cut: Mask) -> Mask:
        """Which of the labels in a vector live."""
        living: Mask = ~cut[self.classes[vector]]
        return living

    def keep_edit(self, cut: Mask, origin: str = "") -> Keep:
        """The edit that removes the classes in `cut`.

        Args:
            cut: mask over the classes.
            origin: the method that asks for it.

        Raises:
            ValueError: a frozen class is to be cut, or a tensor would lose its last index.
        """
        if (cut & self.frozen).any():
            raise ValueError("a frozen class cannot be cut")
        slices: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, (_, labels) in self._tensors.items():
            dims = {}
            for dim, vector in labels.items():
                living = self.alive(vector, cut)
                if not living.any():
                    raise ValueError(f"{name} would lose all of dim {dim}")
                if not living.all():
                    dims[dim] = tuple(np.flatnonzero(living).tolist())
            if dims:
                slices[name] = dims
        sizes = {name: tuple(self._tensors[name][0].shape) for name in slices}
        keep = Keep(slices, sizes, {}, origin)
        return replace(keep, attributes=self._attributes(keep, cut))

    def _attributes(self, keep: Keep, cut: Mask) -> dict[str, dict[str, tuple[Attribute, Attribute]]]:
        found: dict[str, dict[str, tuple[Attribute, Attribute]]] = {}

        def change(path: str, attribute: str, new: Attribute) -> None:
            old = getattr(self.model.get_submodule(path), attribute, None)
            old = tuple(old) if isinstance(old, list) else old
            if isinstance(old, int) and isinstance(new, tuple):
                new = new[0]
            if isinstance(old, int | tuple) and old != new:
                found.setdefault(path, {})[attribute] = (old, new)

        for (path, attribute), vectors in self._held.items():
            counts = tuple(int(self.alive(vector, cut).sum()) for vector in vectors)
            old = getattr(self.model.get_submodule(path), attribute, None)
            if old == tuple(len(v) for v in vectors) or old == len(vectors[0]):
                change(path, attribute, counts if isinstance(old, tuple) else counts[0])
        for (path, attribute), (_, vectors) in self.repaired.items():
            change(path, attribute, tuple(int(self.alive(vector, cut).sum()) for vector in vectors))
        for path in dict.fromkeys(name.rpartition(".")[0] for name in keep.slices):
            module = self.model.get_submodule(path)
            shape = keep.new_size(f"{path}.weight".lstrip(".")) if f"{path}.weight".lstrip(".") in keep.slices else None
            groups = found.get(path, {}).get("groups", (0, getattr(module, "groups", 1)))[1]
            for attribute, new in _sizes_of(module, shape, groups).items():
                change(path, attribute, new)
        return found


def _sizes_of(module: nn.Module, weight: tuple[int, ...] | None, groups: Any) -> dict[str, Attribute]:
    """What the usual modules of torch remember of their weight's shape."""
    if weight is None:
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        inner, outer = (weight[0], weight[1] * groups) if module.transposed else (weight[1] * groups, weight[0])
        return {"in_channels": inner, "out_channels": outer}
    if isinstance(module, Circulant):  # cut by whole blocks
        return {"in_channels": weight[1] * module.block * groups, "out_channels": weight[0] * module.block}
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": weight[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    return {}


def _group_by(keys: npt.NDArray[np.uint64], values: Vector) -> list[tuple[int, Vector]]:
    if not len(values):
        return []
    unique, inverse = np.unique(keys, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(values[order], np.cumsum(np.bincount(inverse, minlength=len(unique)))[:-1])
    return [(int(key), part) for key, part in zip(unique, parts, strict=True)]


def trace_coupling(model: nn.Module, inputs: Tensor | Call | Sequence[Any]) -> Coupling:
    """Run the network once and find out which channels live and die together.

    Any network: functional calls, raw parameters, tied weights, shared layers, any data movement. What an op without
    a rule touches is frozen. The network is run in evaluation mode without gradients, on two samples; parameters that
    only training uses (an auxiliary head) are followed through a second run in training mode. Nothing of it changes.

    Args:
        model: the network.
        inputs: a tensor, positional arguments, or recorded calls; batch first.

    Returns:
        The coupling.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> coupling = trace_coupling(net, torch.zeros(1, 3, 8, 8))
        >>> [(group.name, len(group.classes), group.locations) for group in coupling.groups]
        [('0', 8, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
        >>> coupling.reasons["2.weight[0]"]
        "reaches the network's output"
    """
    calls = resize_batch(as_calls(inputs), 2)
    with undisturbed(model), module_stack(model) as stack:
        tracer = Tracer(model, stack)
        tracer.run(model, calls)
        ops, costs = tracer.ops, tracer.costs
        if any(id(p) not in tracer.used for p in model.parameters()):
            _trace_training(tracer, model, calls)
    tracer.finish()
    tracer.ops, tracer.costs = ops, costs
    return Coupling(model, calls, tracer)


def _trace_training(tracer: Tracer, model: nn.Module, calls: Sequence[Call]) -> None:
    """Follow the labels through a run in training mode."""
    tracer.ops, tracer.costs = [], []
    try:
        for module in model.modules():
            module.training = True
        tracer.run(model, calls)
    except (RuntimeError, ValueError) as error:
        # Training may need what a bare call has not (targets, a larger batch): what only training uses stays whole.
        reason = f"is used in training only, and the training run failed: {error}"
        for op in tracer.ops:
            for vector in op.vectors():
                tracer.space.freeze(vector, reason)
