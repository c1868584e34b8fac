"""Quantize: which weights and values are rounded to a grid of integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress.edits.companions import companion
from lightning_compress.edits.structure import Change, EditError, Replacement, named_tensors, owner
from lightning_compress.grids import Grid
from lightning_compress.quantized import Scope, scope_of, unwatch, watch

__all__ = ["Quantize"]

Site = tuple[str, str, int]
"""Path of a module, name of a function that it calls, which of its calls."""

Argument = tuple[str, str, int, int]
"""The same, and which of the tensors that the function gets."""


@dataclass(frozen=True)
class Quantize:
    """Which weights and values are rounded, and to how many integers.

    Steps and zero points are buffers, beside what they belong to: `weight_step`, one for each output; `relu_0_step` and
    `relu_0_zero` of what the first call of `relu` returns. The edit makes them one and zero; whoever quantizes sets
    them. Weights stay real numbers, to be trained; what is computed with is rounded (see `quantized`).

    Attributes:
        weights: name -> its grid.
        values: site -> grid of what the function returns.
        inputs: argument of a function -> its grid.
        scopes: paths of the modules that are watched, so that sites are found again.
        folded: paths of BatchNorms that a runtime folds into the layer before.
        before: name -> the grid that a quantized weight has; then the edit gives these weights other grids, and nothing
            else is in it.
        target: the kind of processor that the grids were chosen for.
        origin: the method that asked for it, for the report.

    Example:
        >>> from lightning_compress.edits import apply_edits
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> grids = {"weights": {"0.weight": Grid.signed(2)}, "values": {("", "relu", 0): Grid.unsigned(8)}}
        >>> _ = apply_edits(net, [Quantize(**grids, scopes=("", "0"))])
        >>> sorted(net.state_dict())
        ['0.bias', '0.weight', '0.weight_step', 'relu_0_step', 'relu_0_zero']
        >>> _ = net[0].weight.data.copy_(torch.tensor([[0.2, 0.9], [-0.7, 3.0], [0.1, -1.2]]))
        >>> _ = net[0].bias.data.zero_()
        >>> net(torch.eye(2)).detach()
        tensor([[0., 0., 0.],
                [1., 1., 0.]])
    """

    kind: ClassVar[str] = "quantize"
    lasting: ClassVar[bool] = True

    weights: Mapping[str, Grid]
    values: Mapping[Site, Grid] = field(default_factory=dict)
    inputs: Mapping[Argument, Grid] = field(default_factory=dict)
    scopes: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    before: Mapping[str, Grid] = field(default_factory=dict)
    target: str = ""
    origin: str = ""

    def check(self, model: nn.Module) -> None:
        """Raise unless the edit fits."""
        if self.before:
            self._check_again(model)
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors = dict(named_tensors(model))
        for path in self._paths():
            if path not in modules:
                raise EditError(f"edit of {path!r}: the network has no such module; is it another architecture?")
            if scope_of(modules[path]) is not None:
                raise EditError(
                    f"edit of {path!r}: it is quantized already; quantize a network that is not, freshly made or loaded"
                )
        for name in self.weights:
            found = tensors.get(name)
            if not isinstance(found, nn.Parameter) or found.dim() < 2:
                raise EditError(f"edit of {name!r}: the network has no such weight; is it another architecture?")
            if any(companion(model, name, role) is not None for role in ("code", "latent")):
                raise EditError(f"edit of {name!r}: it has shared or latent values, which another grid would undo")

    def apply(self, model: nn.Module) -> list[Change | Replacement]:
        """Carry the edit out on `model`, which `check` has passed."""
        if self.before:
            _regrid(model, self.weights)
            return []
        for path in self._paths():
            module = model.get_submodule(path)
            module.__dict__["_quantization"] = Scope()
            watch(module)
        for name, grid in self.weights.items():
            module, leaf = owner(model, name)
            weight = module._parameters[leaf]
            scope = scope_of(module)
            assert weight is not None
            assert scope is not None
            scope.weights[leaf] = grid
            module.register_buffer(f"{leaf}_step", weight.detach().new_ones(len(weight), dtype=torch.float32))
        like = next(model.parameters()).detach()
        for (path, function, number), grid in self.values.items():
            own = scope_of(model.get_submodule(path))
            assert own is not None
            own.values[function, number] = grid
        for (path, function, number, which), grid in self.inputs.items():
            own = scope_of(model.get_submodule(path))
            assert own is not None
            own.inputs[function, number, which] = grid
        for path in dict.fromkeys([*(site[0] for site in self.values), *(argument[0] for argument in self.inputs)]):
            module = model.get_submodule(path)
            own = scope_of(module)
            assert own is not None
            for prefix, _ in own.grids():
                for what, value in (("step", 1.0), ("zero", 0.0)):
                    module.register_buffer(f"{prefix}_{what}", like.new_full((), value, dtype=torch.float32))
        for path in self.folded:
            scope = scope_of(model.get_submodule(path))
            assert scope is not None
            scope.folded = True
        return []

    def revert(self, model: nn.Module) -> None:
        """Round no more, or as before."""
        if self.before:
            _regrid(model, self.before)
            return
        for path in self._paths():
            module = model.get_submodule(path)
            scope = scope_of(module)
            assert scope is not None
            unwatch(module)
            for name in [f"{leaf}_step" for leaf in scope.weights]:
                delattr(module, name)
            for prefix, _ in scope.grids():
                delattr(module, f"{prefix}_step")
                delattr(module, f"{prefix}_zero")
            del module.__dict__["_quantization"]

    def to_json(self) -> dict[str, Any]:
        """The edit as JSON data."""
        return {
            "kind": self.kind,
            "weights": {name: [grid.low, grid.high] for name, grid in self.weights.items()},
            "values": [[*site, grid.low, grid.high] for site, grid in self.values.items()],
            "inputs": [[*argument, grid.low, grid.high] for argument, grid in self.inputs.items()],
            "scopes": list(self.scopes),
            "folded": list(self.folded),
            "before": {name: [grid.low, grid.high] for name, grid in self.before.items()},
            "target": self.target,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantize:
        """The inverse of `to_json`."""
        return cls(
            weights=_grids(data["weights"]),
            values={(str(p), str(f), int(n)): Grid(int(low), int(high)) for p, f, n, low, high in data["values"]},
            inputs={
                (str(p), str(f), int(n), int(which)): Grid(int(low), int(high))
                for p, f, n, which, low, high in data["inputs"]
            },
            scopes=tuple(str(path) for path in data["scopes"]),
            folded=tuple(str(path) for path in data["folded"]),
            before=_grids(data["before"]),
            target=str(data["target"]),
            origin=data["origin"],
        )

    def _check_again(self, model: nn.Module) -> None:
        if self.before.keys() != self.weights.keys() or self.values or self.inputs:
            raise EditError("an edit that gives weights other grids names the old and the new ones, and nothing else")
        for name, grid in self.before.items():
            path, _, leaf = name.rpartition(".")
            scope = scope_of(model.get_submodule(path)) if path in dict(model.named_modules()) else None
            found = None if scope is None else scope.weights.get(leaf)
            if found != grid:
                raise EditError(f"edit of {name!r}: expected it to be quantized to {grid}, got {found}")

    def _paths(self) -> tuple[str, ...]:
        owners = [name.rpartition(".")[0] for name in self.weights]
        sites = [*(site[0] for site in self.values), *(argument[0] for argument in self.inputs)]
        return tuple(dict.fromkeys([*self.scopes, *self.folded, *owners, *sites]))


def _regrid(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    for name, grid in grids.items():
        module, leaf = owner(model, name)
        scope = scope_of(module)
        assert scope is not None
        scope.weights[leaf] = grid


def _grids(data: Mapping[str, Sequence[int]]) -> dict[str, Grid]:
    return {name: Grid(int(low), int(high)) for name, (low, high) in data.items()}
