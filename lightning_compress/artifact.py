"""The artifact: a compressed network in one safetensors file, which loads without the code that compressed it.

The file holds the tensors under the names that the original network gives them, and in its metadata the edits, what
the original looked like, and a checksum of the whole. There is no pickle in it. Tensors that are tied are stored once;
those with zeros or repeated values are entropy-coded where that is smaller. Quantized weights are stored as integers,
so that of 4 or 2 bits, coded, no more are left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.container import ArtifactError, container_bytes, read_container, storable, write_container
from lightning_compress.edits import (
    Edit,
    EditError,
    apply_edits,
    companions,
    edits_from_json,
    edits_to_json,
    history,
    named_tensors,
    rewind_edits,
    skeleton,
)
from lightning_compress.methods.quantization import integers, quantized_weights
from lightning_compress.quiet import without_observers

__all__ = ["ArtifactError", "artifact_bytes", "load_compressed", "read_metadata", "save_compressed"]


def save_compressed(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a network, compressed or not, as an artifact; the file appears whole or not at all.

    Args:
        model: the network, with its history of edits. Its own state dict is what is stored.
        path: the file to write, in a folder that exists; an older file is replaced.
        metadata: anything of yours that JSON can hold, returned by `read_metadata`.

    Raises:
        ArtifactError: the folder is missing, or the state dict holds what safetensors cannot.

    Example:
        >>> import pathlib, tempfile
        >>> from lightning_compress.edits import Keep
        >>> net = nn.Linear(2, 3)
        >>> slices = {"weight": {0: (0, 2)}, "bias": {0: (0, 2)}}
        >>> _ = apply_edits(net, [Keep(slices, {"weight": (3, 2), "bias": (3,)})])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(net, pathlib.Path(folder, "net.safetensors"))
        ...     load_compressed(pathlib.Path(folder, "net.safetensors"), nn.Linear(2, 3)).weight.shape
        torch.Size([2, 2])
    """
    _require_network(model)
    write_container(path, *_contents(model, metadata))


def artifact_bytes(model: nn.Module, metadata: Mapping[str, Any] | None = None, coded: bool = True) -> int:
    """The size in bytes of the file that `save_compressed` would write.

    Args:
        model: the network; or a skeleton of it, whose tensors count as they are.
        metadata: as for `save_compressed`.
        coded: with what entropy coding saves; without, values do not matter.

    Example:
        >>> artifact_bytes(nn.Linear(100, 200)) - artifact_bytes(nn.Linear(100, 100))
        40400
    """
    return container_bytes(*_contents(model, metadata), coded=coded)


def load_compressed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load an artifact into a freshly made network of the original, dense architecture.

    Everything is checked before `model` is touched; on any error it is what it was. The tensors take the dtypes of the
    file, and stay on their device and in their memory format; ties are those that `model` has. Buffers that are in no
    state dict are as the constructor makes them, cut by the edits.

    Args:
        path: a file that `save_compressed` wrote.
        model: the dense network; or one that has been through exactly the edits of the file.

    Returns:
        `model`, with the edits applied and the weights loaded, in eval mode.

    Raises:
        ArtifactError: no such file, one that is damaged or of another kind, or another architecture.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(nn.Linear(2, 3), pathlib.Path(folder, "net.safetensors"))
        ...     load_compressed(pathlib.Path(folder, "net.safetensors"), nn.Linear(2, 3)).training
        False
    """
    _require_network(model)
    manifest, tensors = read_container(path)
    try:
        edits = edits_from_json(manifest["edits"])
    except EditError as error:
        raise ArtifactError(
            f"{os.fspath(path)!r}: {error}; a newer version of lightning_compress may know it"
        ) from error
    network = _unwrapped(model)
    for name, tensor in named_tensors(network):
        if tensor.is_meta:
            raise ArtifactError(f"cannot load into {name!r}: it is on the meta device; make the network on a real one")
    _compare(f"{os.fspath(path)!r} is of another architecture", _dense_shapes(network), manifest["architecture"])
    applied = history(network)
    if applied and applied != edits:
        raise ArtifactError(
            f"{os.fspath(path)!r} has {len(edits)} edits and the network has already been through {len(applied)} "
            "others; load into a freshly made network"
        )
    pending = () if applied else edits
    for name, kind in manifest["integers"].items():
        tensors[name] = _as_numbers(tensors[name], tensors[f"{name}_step"], getattr(torch, kind))
    state = {**tensors, **{alias: tensors[name] for alias, name in manifest["aliases"].items()}}
    with without_observers(network):
        trial = skeleton(network)
    try:
        apply_edits(trial, pending)
    except EditError as error:
        raise ArtifactError(f"{os.fspath(path)!r} does not fit the network: {error}") from error
    _check_state(f"{os.fspath(path)!r} does not fit the network", trial, state)
    apply_edits(network, pending)
    dtypes = {name: getattr(torch, dtype) for name, dtype in manifest["dtypes"].items()}
    for name, tensor in named_tensors(network):
        dtype = state[name].dtype if name in state else dtypes.get(name, tensor.dtype)
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
    network.load_state_dict(state, strict=True)
    return model.eval()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an artifact says about itself; the file is checked as `load_compressed` checks it.

    Args:
        path: a file that `save_compressed` wrote.

    Returns:
        `edits`: the edits, as objects; `architecture`: tensor name -> shape in the dense network; `metadata`: what
        was given to `save_compressed`.

    Raises:
        ArtifactError: no such file, or one that is damaged or of another kind.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(nn.Linear(2, 3), pathlib.Path(folder, "net.safetensors"), {"accuracy": 0.93})
        ...     read_metadata(pathlib.Path(folder, "net.safetensors"))["metadata"]
        {'accuracy': 0.93}
    """
    manifest, _ = read_container(path)
    return {
        "edits": edits_from_json(manifest["edits"]),
        "architecture": {name: tuple(shape) for name, shape in manifest["architecture"].items()},
        "metadata": manifest["metadata"],
    }


def _contents(model: nn.Module, metadata: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the file of a network holds: each tensor of its state dict once, and the manifest."""
    model = _unwrapped(model)
    passing = _passing(model)
    tensors, aliases = _unique_state(model, passing)
    known = {*tensors, *aliases, *passing}
    whole = {
        name: integers(weight, step, grid)
        for name, weight, step, grid in quantized_weights(model)
        if name in tensors and step.shape == weight.shape[:1]
    }
    kinds = {name: str(tensors[name].dtype).removeprefix("torch.") for name in whole}
    tensors |= whole
    unsaved = {name: tensor for name, tensor in named_tensors(model) if name not in known}
    return tensors, {
        "edits": edits_to_json(_lasting(model)),
        "architecture": {name: list(shape) for name, shape in _dense_shapes(model).items()},
        "aliases": aliases,
        "integers": kinds,
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in unsaved.items()},
        "metadata": dict(metadata or {}),
    }


def _as_numbers(whole: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers times their steps."""
    return (whole.float() * step.view(-1, *[1] * (whole.dim() - 1))).to(dtype)


def _require_network(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a network, a torch.nn.Module, got {type(model).__name__}; the order is "
            "save_compressed(model, path) and load_compressed(path, model)"
        )


def _lasting(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that a network is no longer the same without, once it is trained."""
    return tuple(edit for edit in history(model) if edit.lasting)


def _passing(model: nn.Module) -> set[str]:
    """Names of tensors that only training needs."""
    names = dict(model.named_modules(remove_duplicate=False))
    return {f"{path}.{name}".lstrip(".") for path, module in names.items() for name in companions(module)}


def _unique_state(model: nn.Module, passing: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and under which name a tied one is stored."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in passing:
            continue
        if not isinstance(tensor, Tensor) or not storable(tensor):
            kind = f"{tensor.layout}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArtifactError(f"cannot save {name!r} of the state dict: a dense tensor is needed, got {kind}")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would rename every tensor
    return inner if isinstance(inner, nn.Module) else model


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """All tensors with the shapes that they had before any edit."""
    if history(model):
        with without_observers(model):
            model = skeleton(model)
        rewind_edits(model)
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}


def _compare(what: str, got: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    lines = [
        f"  {name}: expected {_shape(expected.get(name))}, got {_shape(got.get(name))}"
        for name in dict.fromkeys([*expected, *got])
        if _shape(expected.get(name)) != _shape(got.get(name))
    ]
    if lines:
        rest = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise ArtifactError("\n".join([f"{what}; tensors that differ:", *lines[:5], *rest]))


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _check_state(what: str, trial: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors of the file are exactly those of the edited network."""
    wanted = trial.state_dict(keep_vars=True)
    _compare(what, {name: t.shape for name, t in wanted.items()}, {name: t.shape for name, t in state.items()})
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        other = first.setdefault(id(tensor), name)
        if state[other] is not state[name] and not torch.equal(state[other], state[name]):
            raise ArtifactError(f"{what}: it ties {other!r} and {name!r}, which differ in the file; make it untied")
