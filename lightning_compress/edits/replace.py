"""Replace: other layers in the place of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.edits.companions import companions
from lightning_compress.edits.specs import Spec, build, describe, frozen_spec, show
from lightning_compress.edits.structure import Change, EditError, Replacement, refuse_quantized

__all__ = ["Replace"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Replace:
    """Which layers give way to which.

    An edit holds no weights. On a trained network the new layers start from zero, and whoever replaces sets them; only
    the bias of a layer is carried over to the last layer of what replaces it, as the same parameter.

    Attributes:
        layers: module name -> (what is there, what comes), as specifications.
        origin: the method that asked for it, for the report.

    Example:
        >>> from lightning_compress.edits import apply_edits, describe
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> pair = nn.Linear(8, 2, bias=False), nn.Linear(2, 8)
        >>> chain = {"type": "Chain", "form": "channel", "layers": tuple(describe(layer) for layer in pair)}
        >>> _ = apply_edits(net, [Replace({"0": (describe(net[0]), chain)})])
        >>> [name for name, _ in net.named_parameters()]
        ['0.0.weight', '0.1.weight', '0.1.bias']
    """

    kind: ClassVar[str] = "replace"
    lasting: ClassVar[bool] = True

    layers: Mapping[str, tuple[Spec, Spec]]
    origin: str = ""

    def check(self, model: nn.Module) -> None:
        """Raise unless the edit fits."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, (before, after) in self.layers.items():
            if not path:
                raise EditError("the network itself cannot be replaced: only layers inside of it")
            if path not in modules:
                raise EditError(f"edit of {path!r}: the network has no such layer; is it another architecture?")
            found = describe(modules[path])
            if found != before:
                raise EditError(
                    f"edit of {path!r}: expected {show(before)}, got {show(found)}; was it applied before, or is this "
                    "another architecture?"
                )
            beside = [name for module in modules[path].modules() for name in companions(module)]
            if beside:
                raise EditError(
                    f"edit of {path!r}: its weights are pruned or shared or latent ({beside[0]}), which would be lost"
                )
            for name, _ in modules[path].named_parameters():
                refuse_quantized(modules[path], name)
            build(after, torch.empty(0, device="meta"))

    def apply(self, model: nn.Module) -> list[Change | Replacement]:
        """Carry the edit out on `model`, which `check` has passed."""
        return [_install(model, path, after) for path, (_, after) in self.layers.items()]

    def revert(self, model: nn.Module) -> None:
        """Put layers of the old kind back; the values become zero."""
        for path, (before, _) in self.layers.items():
            _install(model, path, before)

    def to_json(self) -> dict[str, Any]:
        """The edit as JSON data."""
        return {
            "kind": self.kind,
            "layers": {path: [dict(before), dict(after)] for path, (before, after) in self.layers.items()},
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Replace:
        """The inverse of `to_json`."""
        layers = {path: (frozen_spec(before), frozen_spec(after)) for path, (before, after) in data["layers"].items()}
        return cls(layers, data["origin"])


def _install(model: nn.Module, path: str, spec: Spec) -> Replacement:
    old = model.get_submodule(path)
    parameters = list(old.parameters())
    like = parameters[0].detach() if parameters else next(model.parameters()).detach()
    new = build(spec, like)
    new.train(old.training)
    for parameter in new.parameters():
        parameter.requires_grad_(parameters[0].requires_grad if parameters else True)
        if parameter.dim() == 4 and like.dim() == 4 and not like.is_contiguous():
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    _carry_bias(old, new)
    for kind in _HOOKS:  # the dicts themselves: handles that users hold refer to them
        new.__dict__[kind] = old.__dict__[kind]
    new._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
    new._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
    new._forward_hooks_always_called = old._forward_hooks_always_called
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:  # under every name it has
                parent._modules[name] = new
    kept = {id(parameter) for parameter in new.parameters()}
    had = {id(parameter) for parameter in parameters}
    return Replacement(
        tuple(parameter for parameter in parameters if id(parameter) not in kept),
        tuple(parameter for parameter in new.parameters() if id(parameter) not in had),
    )


def _carry_bias(old: nn.Module, new: nn.Module) -> None:
    before, after = _last_bias(old), _last_bias(new)
    if before is not None and after is not None:
        bias, owner = before._parameters["bias"], after._parameters["bias"]
        assert bias is not None
        assert owner is not None
        if bias.shape == owner.shape:
            after._parameters["bias"] = bias


def _last_bias(module: nn.Module) -> nn.Module | None:
    """The last layer that has weights, if it has a bias."""
    last = None
    for part in _leaves(module):
        last = part
    return last if last is not None and last._parameters.get("bias") is not None else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part._parameters.get("weight"), Tensor):
            yield part
