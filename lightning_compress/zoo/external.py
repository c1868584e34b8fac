"""The networks of timm and torchvision, by name; both come with the extra `vision`."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress.extras import require_extra

__all__ = ["published_model", "timm_model", "torchvision_model"]


def timm_model(
    name: str, pretrained: bool | str | Path = False, in_channels: int = 3, num_classes: int = 10, **options: Any
) -> nn.Module:
    """A network of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models).

    Args:
        name: as in `timm.list_models()`, with or without the tag of pretrained weights (`resnet18.a1_in1k`).
        pretrained: start from trained weights, downloaded once; the head for `num_classes` starts afresh. Or the path
            of a file of weights (.safetensors, or a state dict that `torch.load(weights_only=True)` reads), for as
            many channels.
        in_channels: channels of the images; timm adapts pretrained first layers to it.
        num_classes: how many logits come out.
        **options: passed on to `timm.create_model`, `img_size=32` for instance.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no network of that name, or the file's weights are not of this network.
        ConnectionError: the weights could not be downloaded.
        FileNotFoundError: there is no such file.

    Example:
        >>> net = timm_model("resnet18", in_channels=1)
    """
    timm = require_extra("timm", "vision")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained is True, in_chans=in_channels, num_classes=num_classes, **options
        )
    except OSError as error:
        raise _no_weights("timm", name, error) from error
    if not isinstance(pretrained, bool):
        _load_file(network, Path(pretrained), num_classes)
    return network


def torchvision_model(
    name: str, pretrained: bool | str | Path = False, in_channels: int = 3, num_classes: int = 10, **options: Any
) -> nn.Module:
    """A classification network of torchvision.

    Args:
        name: as in `torchvision.models.list_models(torchvision.models)`.
        pretrained: start from torchvision's best weights, downloaded once; if they are for another number of
            classes, the last layer starts afresh. Or the path of a file of weights, as for `timm_model`.
        in_channels: must be 3, the only number that these networks are made for.
        num_classes: how many logits come out.
        **options: passed on to torchvision's builder; `aux_logits=False` keeps `googlenet` and `inception_v3` from
            returning three outputs in training.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: torchvision has no classification network of that name, `in_channels` is not 3, or the file's
            weights are not of this network.
        ConnectionError: the weights could not be downloaded.
        FileNotFoundError: there is no such file.

    Example:
        >>> net = torchvision_model("mobilenet_v2")
    """
    models = require_extra("torchvision.models", "vision")
    names = models.list_models(models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    if in_channels != 3:
        raise ValueError(
            f"torchvision's networks take images of 3 channels, got `in_channels` = {in_channels}; let the data give "
            "3 (data.in_channels=3 repeats gray ones), or take the network from timm, which adapts"
        )
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if not isinstance(pretrained, bool):
        _load_file(network, Path(pretrained), num_classes)
    elif pretrained:
        try:
            weights = models.get_model_weights(name).DEFAULT.get_state_dict()
        except OSError as error:
            raise _no_weights("torchvision", name, error) from error
        _load_but_head(network, weights, num_classes)
    return network


def published_model(library: str, name: str) -> nn.Module:
    """A network with its published weights and its own classes, as a teacher needs it.

    Args:
        library: "timm" or "torchvision".
        name: the network's name there.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: it has no network of that name.
        ConnectionError: the weights could not be downloaded.
    """
    models = require_extra("timm" if library == "timm" else "torchvision.models", "vision")
    names = models.list_models() if library == "timm" else models.list_models(models)
    if not (models.is_model(name) if library == "timm" else name in names):
        raise _unknown(library, name, names)
    network: nn.Module
    try:
        if library == "timm":
            network = models.create_model(name, pretrained=True)
        else:
            network = models.get_model(name, weights="DEFAULT")
    except OSError as error:
        raise _no_weights(library, name, error) from error
    return network


def _load_file(network: nn.Module, path: Path, num_classes: int) -> None:
    weights = _read_weights(path)
    own = network.state_dict()
    foreign = [key for key in weights if key not in own]
    if foreign:  # what is of a deeper network of the same kind would otherwise load in part, without a word
        raise ValueError(f"{path} is of another network: this one has no {_listed(foreign)}")
    _load_but_head(network, weights, num_classes)


def _read_weights(path: Path) -> dict[str, Any]:
    """A state dict from a file, where it may lie under "state_dict"."""
    if not path.is_file():
        raise FileNotFoundError(f"`pretrained` must be true, false or a file of weights; there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:
        # whatever damage leads to
        raise ValueError(f"`pretrained`: {path} holds something else than tensors, or is damaged: {error}") from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        raise ValueError(f'`pretrained`: {path} holds no state dict, neither by itself nor under "state_dict"')
    return weights


def _load_but_head(network: nn.Module, weights: dict[str, Any], num_classes: int) -> None:
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    fresh = [key for key in own if key not in fitting]
    body = [key for key in fresh if own[key].dim() == 0 or own[key].shape[0] != num_classes]
    if body:
        raise ValueError(f"the pretrained weights do not fit the network at {_listed(body)}; were options changed?")
    network.load_state_dict(fitting, strict=False)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def _unknown(library: str, name: str, names: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(name, names, n=5)
    hint = f"did you mean {', '.join(near)}?" if near else f"see what there is with {library}'s list_models()"
    return ValueError(f"{library} has no classification network named {name!r}; {hint}")


def _no_weights(library: str, name: str, error: OSError) -> ConnectionError:
    return ConnectionError(
        f"the pretrained weights of {library}'s {name!r} could not be downloaded ({error}); "
        "without a network, train from scratch: pretrained=false"
    )
