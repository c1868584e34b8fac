"""2:4 sparsity made fast: weights in the format that sparse tensor cores multiply, where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from lightning_compress.edits import renew

__all__ = ["SparseKernels", "is_two_four", "sparse_layers", "use_sparse_kernels"]

_CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores (Ampere)
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SparseKernels:
    """What `use_sparse_kernels` did.

    Attributes:
        converted: names of the layers that multiply by sparse kernels now.
        left: name of each other layer with a 2:4 weight -> why it stays dense.

    Example:
        >>> kernels = SparseKernels(("head",), {"stem": "is no linear layer"})  # what `use_sparse_kernels` gives
        >>> len(kernels.converted), kernels.left["stem"]
        (1, 'is no linear layer')
    """

    converted: tuple[str, ...]
    left: Mapping[str, str]


def is_two_four(weight: Tensor) -> bool:
    """Whether of each four inputs in a row at most two are not zero.

    Args:
        weight: [outputs, inputs, ...].

    Example:
        >>> is_two_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), is_two_four(torch.ones(1, 4))
        (True, False)
    """
    if weight.dim() < 2 or weight.shape[1] % 4:
        return False
    alive = (weight != 0).transpose(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    return bool((alive <= 2).all())


def sparse_layers(model: nn.Module) -> dict[str, str | None]:
    """The layers whose weights are 2:4 sparse.

    Args:
        model: the network, where it is to run and in the precision in which it is to run.

    Returns:
        Name -> why no sparse kernel can multiply by its weight; None where one can.

    Example:
        >>> sparse_layers(nn.Linear(4, 4))
        {}
    """
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_two_four(weight):
            found[name] = _refused(module, weight)
    return found


@torch.no_grad()
def use_sparse_kernels(model: nn.Module) -> SparseKernels:
    """Let linear layers whose weights are 2:4 sparse multiply by sparse tensor cores, in place, for inference.

    What `WeightPruning(pattern="2:4")` leaves are zeros; only this makes them fast, where the hardware has kernels for
    them (Mishra et al. 2021, 'Accelerating sparse deep neural networks', arXiv 2104.08378). A converted layer computes
    what it did, with half of the multiplications. PyTorch has such kernels for linear layers, in half precision, on
    NVIDIA GPUs from Ampere on; for convolutions it has none, and on a CPU neither: what stays dense is named.

    Args:
        model: the network, where it is to run and in the precision in which it is to run.

    Returns:
        Which layers were converted, and why others were not.

    Raises:
        ValueError: no weight of the network is 2:4 sparse.

    Example:
        >>> layer = nn.Linear(64, 32)
        >>> _ = layer.weight.data[:, ::2].zero_()
        >>> use_sparse_kernels(nn.Sequential(layer)).left
        {'0': 'cpu has no kernels for 2:4 sparsity: a GPU with compute capability 8.0 or above is needed'}
    """
    converted, left = [], {}
    found = sparse_layers(model)
    if not found:
        raise ValueError('no weight of this network is 2:4 sparse: prune with WeightPruning(pattern="2:4") first')
    for name, reason in found.items():
        if reason is not None:
            left[name] = reason
            continue
        try:
            renew(model.get_submodule(name), lambda weight: to_sparse_semi_structured(weight.contiguous()), "weight")
        except RuntimeError as error:  # sizes that are no multiples of the kernel's, which differ by library
            left[name] = f"torch refuses: {error}"
        else:
            converted.append(name)
    return SparseKernels(tuple(converted), left)


def _refused(module: nn.Module, weight: Tensor) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"torch has no kernels for a 2:4 sparse {type(module).__name__}"
    device = weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        major, minor = _CAPABILITY
        return (
            f"{name} has no kernels for 2:4 sparsity: a GPU with compute capability {major}.{minor} or above is needed"
        )
    if weight.dtype not in _DTYPES:
        return f"its kernels take {' or '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, not {weight.dtype}"
    return None
