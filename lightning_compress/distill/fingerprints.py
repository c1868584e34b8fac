"""Short names for weights and for inputs, to tell them from others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["differ", "fingerprint", "raw_bytes", "weights_digest"]

_PROJECTIONS = 8
WIDTH = _PROJECTIONS + 1
_BLOCK = 4096  # inputs are projected in blocks of so many numbers, so that the signs take little memory
_CHUNK = 2**22  # numbers that are converted to float64 at a time
# Inputs are the same up to this share of their norm: mixup of 1 % moves a photograph by 0.003 or more. Rounding moves
# it by about a seventh of the dtype's epsilon; that of bfloat16 is the larger of the two.
_TOLERANCE, _ROUNDING = 0.0005, 1 / 3


def weights_digest(module: nn.Module) -> str:
    """A short name for what a network's weights are: names, dtypes, shapes and every bit of its state dict.

    The code of the network is not part of it: delete the cache when the teacher's `forward` is changed.

    Args:
        module: the network, on any device.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> before = weights_digest(net)
        >>> weights_digest(net.bfloat16()) == before
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(raw_bytes(value.reshape(-1)).data)
        else:  # what a module's get_extra_state() returns
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint(inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """Numbers that tell each sample's input from others, whatever batch and device it is in.

    Each input is projected on eight fixed vectors of random signs, in float64. The mean square by which the
    projections of two inputs differ estimates the squared distance of the inputs (Achlioptas 2003).

    Args:
        inputs: tensors [N, ...].

    Returns:
        [N, len(inputs), 9]: the projections of each input, and the distance up to which another is the same.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> fingerprint([x]).shape, bool((fingerprint([x])[1:] == fingerprint([x[1:]])).all())
        ((2, 1, 9), True)
    """
    return np.stack([_project(x.detach()).cpu().numpy() for x in inputs], axis=1).astype(np.float32)


def differ(old: npt.NDArray[np.float32], new: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether inputs are further apart than rounding takes them.

    Args:
        old: what `fingerprint` gave for N samples.
        new: likewise, for the same samples.

    Returns:
        [N], true where any of the sample's inputs is another.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> differ(fingerprint([x]), fingerprint([x * torch.tensor([[1.0], [0.99]])])).tolist()
        [False, True]
    """
    distance = np.sqrt(np.square(old[..., :-1].astype(np.float64) - new[..., :-1]).mean(-1))
    near = distance <= np.maximum(old[..., -1], new[..., -1])
    # An infinite input is infinitely far from every other, and allows for infinite rounding.
    same: npt.NDArray[np.bool_] = (near & np.isfinite(distance)).all(1)
    return ~same


def _project(x: Tensor) -> Tensor:
    if x.device.type == "mps":  # has no float64
        x = x.cpu()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    count, size = flat.shape
    blocks = max(1, math.ceil(size / _BLOCK))
    # Signs that are products of one for the place in the block and one for the block: enough for pairwise
    # independence, on which the estimate rests.
    places, order = _signs("places", _BLOCK).to(x.device), _signs("blocks", blocks).to(x.device)
    result = torch.empty(count, _PROJECTIONS + 1, dtype=torch.float64, device=x.device)
    share = max(_TOLERANCE, _ROUNDING * torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
    chunk = max(1, _CHUNK // (blocks * _BLOCK))
    for start in range(0, count, chunk):
        some = flat[start : start + chunk]
        padded = torch.zeros(len(some), blocks * _BLOCK, dtype=torch.float64, device=x.device)
        padded[:, :size] = some
        projected = padded.view(-1, blocks, _BLOCK) @ places
        result[start : start + chunk, :-1] = (projected * order).sum(1)
        result[start : start + chunk, -1] = share * padded.norm(dim=1)
    return result


@cache
def _signs(label: str, count: int) -> Tensor:
    """Float64 [count, projections] of 1 and -1. From a hash: no library's random numbers are the same for ever."""
    raw = hashlib.shake_256(label.encode()).digest(count * _PROJECTIONS // 8)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)).reshape(count, _PROJECTIONS)
    return torch.from_numpy(bits * 2.0 - 1.0)


def raw_bytes(x: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor along its last dim, as an array: numpy has no bfloat16.

    Example:
        >>> raw_bytes(torch.ones(2, 3, dtype=torch.bfloat16)).shape
        (2, 6)
    """
    return x.detach().cpu().contiguous().view(torch.uint8).numpy()
