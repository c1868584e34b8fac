"""NaN as a mark on channels that are gone: runs a network as if it had been built without them.

Slices of the parameters that a tool removes are set to NaN beforehand. Products then ignore NaN and mark those outputs
that nothing alive leads to, reductions run over what is not NaN, and everything else hands NaN on, as IEEE 754 has
it. So a channel that is gone is NaN wherever it flows, however it is rearranged, and no rule about layers is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Marked"]


class Marked(TorchDispatchMode):
    """Runs a network in which NaN marks what was cut away.

    Attributes:
        reduced: names of the reductions that had to leave marked entries out.
        strange: names of the ops that met marks and for which leaving them out has no meaning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduced: set[str] = set()
        self.strange: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(leaf.is_floating_point() and leaf.isnan().any() for leaf in leaves):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            return PRODUCTS[name](func, args, kwargs)
        if name in REDUCTIONS:
            whole = func(*_clean(args), **kwargs)
            result = REDUCTIONS[name](func, args, kwargs)
            if not _same_where_alive(whole, result):
                self.reduced.add(name)
            return result
        if not (torch.Tag.pointwise in func.tags or func.is_view or name.rstrip("_") in CHANNELWISE.split()):
            self.strange.add(name)
        return func(*args, **kwargs)


# Ops that treat each channel alone or only move data: NaN stays in its channel without our help.
CHANNELWISE = """
    clone contiguous copy _to_copy cat stack constant_pad_nd index index_select gather roll flip repeat expand_copy
    slice_scatter select_scatter index_put scatter split_with_sizes_copy _unsafe_view _reshape_copy masked_fill
    where pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unbind lift_fresh fill zero
    zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full reflection_pad2d
    replication_pad2d max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d avg_pool1d
    avg_pool2d avg_pool3d adaptive_max_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa
    native_dropout _prelu_kernel hardtanh hardswish hardsigmoid relu6 leaky_relu elu silu mish gelu glu softplus
"""


def _clean(value: Any) -> Any:
    """The same with 0 for NaN."""
    return pytree.tree_map_only(Tensor, lambda t: torch.nan_to_num(t, 0.0) if t.is_floating_point() else t, value)


def _gone(tensor: Tensor, dims: Sequence[int], keepdim: bool = True) -> Tensor:
    """Where all entries along `dims` are marked; of a tensor without such dims, where it is marked itself."""
    gone = tensor.isnan()
    return gone.all(dim=tuple(dims), keepdim=keepdim) if dims else gone


def _convolution(func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    weight, bias, transposed, groups = args[1], args[2], args[6], args[8]
    result = func(*_clean(args), **kwargs)
    spatial = range(2, weight.dim())
    if transposed:  # (in, out / groups, ...): an output is gone if all that lead to it are
        parts = weight.unflatten(0, (groups, -1))
        gone = _gone(parts, (1, *(d + 1 for d in spatial)), keepdim=False).flatten()
    else:
        gone = _gone(weight, (1, *spatial), keepdim=False)
    if bias is not None:
        gone = gone | bias.isnan()
    return result.masked_fill(gone.view(1, -1, *[1] * len(spatial)), float("nan"))


def _matmul(func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    *bias, a, b = args[:3] if len(args) > 2 else args
    gone = _gone(a, (-1,)) | (_gone(b, (-2,)) if b.dim() > 1 else b.isnan().all())
    for term in bias:
        gone = gone | term.isnan()
    return func(*_clean(args), **kwargs).masked_fill(gone, float("nan"))


def _dims(tensor: Tensor, dim: Any) -> tuple[int, ...]:
    dims = range(tensor.dim()) if dim is None or dim == [] else ([dim] if isinstance(dim, int) else dim)
    return tuple(d % tensor.dim() for d in dims)


def _argument(func: Any, args: tuple[Any, ...], kwargs: Any, name: str, default: Any) -> Any:
    names = [argument.name for argument in func._schema.arguments]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else kwargs.get(name, default)


def _moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    mean = torch.nanmean(x, dim=tuple(dims), keepdim=True)
    return mean, torch.nanmean((x - mean).square(), dim=tuple(dims), keepdim=True)


def _reduce(over: Callable[[Tensor, tuple[int, ...], Tensor], Tensor]) -> Callable[..., Tensor]:
    """A reduction over dims: `over` gets the clean tensor, the dims and the number of entries that count."""

    def run(func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        x = args[0]
        dims = _dims(x, _argument(func, args, kwargs, "dim", None))
        keepdim = bool(_argument(func, args, kwargs, "keepdim", False))
        alive = (~x.isnan()).sum(dims, keepdim=True)
        result = over(x, dims, alive).masked_fill(alive == 0, float("nan"))
        return result if keepdim else result.squeeze(dims)

    return run


def _variance(func: Any, args: tuple[Any, ...], kwargs: Any, *, root: bool = False, mean: bool = False) -> Any:
    x = args[0]
    dims = _dims(x, _argument(func, args, kwargs, "dim", None))
    correction = _argument(func, args, kwargs, "correction", 1)
    correction = 1 if correction is None else correction
    centre, spread = _moments(x, dims)
    count = (~x.isnan()).sum(dims, keepdim=True)
    spread = spread * count / (count - correction)
    results = (spread.sqrt() if root else spread, centre)
    if not _argument(func, args, kwargs, "keepdim", False):
        results = tuple(r.squeeze(dims) for r in results)
    return results if mean else results[0]


def _softmax(func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    x = args[0]
    result = func(x.masked_fill(x.isnan(), -torch.inf), *args[1:], **kwargs)
    return result.masked_fill(x.isnan(), float("nan"))


def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args
    mean, variance = _moments(x, range(x.dim() - len(shape), x.dim()))
    rstd = (variance + eps).rsqrt()
    return _affine((x - mean) * rstd, weight, bias), mean, rstd


def _rms_norm(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    x, shape, weight, eps = args
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    rstd = (torch.nanmean(x.square(), dim=dims, keepdim=True) + (eps or torch.finfo(x.dtype).eps)).rsqrt()
    return _affine(x * rstd, weight, None), rstd


def _group_norm(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    x, weight, bias, n, channels, _, groups, eps = args
    parts = x.reshape(n, groups, -1)
    mean, variance = _moments(parts, (2,))
    rstd = (variance + eps).rsqrt()
    view = (1, channels, *[1] * (x.dim() - 2))
    weight, bias = (None if t is None else t.view(view) for t in (weight, bias))
    return _affine(((parts - mean) * rstd).view(x.shape), weight, bias), mean[..., 0], rstd[..., 0]


def _batch_norm(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    # In eval mode and with statistics NaN stays where it is; without (weight standardisation by way of batch norm,
    # instance norm) the statistics are of what is alive.
    x, weight, bias, mean, variance = args[:5]
    if args[5] if len(args) == 8 else mean is None:
        mean, variance = (m.flatten() for m in _moments(x, (0, *range(2, x.dim()))))
    view = (1, -1, *[1] * (x.dim() - 2))
    rstd = (variance + args[-1]).rsqrt()
    weight, bias = (None if t is None else t.view(view) for t in (weight, bias))
    return _affine((x - mean.view(view)) * rstd.view(view), weight, bias), mean, rstd


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _weight_norm(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    direction, length = args[:2]
    norm = func(_clean(direction), torch.ones_like(length), *args[2:], **kwargs)[1]
    return direction * (length / norm), norm


PRODUCTS: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _matmul,
    "baddbmm": _matmul,
    "mv": _matmul,
}

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": _reduce(lambda x, dims, alive: torch.nanmean(x, dim=dims, keepdim=True)),
    "sum": _reduce(lambda x, dims, alive: torch.nansum(x, dim=dims, keepdim=True)),
    "amax": _reduce(lambda x, dims, alive: torch.nan_to_num(x, -torch.inf).amax(dims, keepdim=True)),
    "amin": _reduce(lambda x, dims, alive: torch.nan_to_num(x, torch.inf).amin(dims, keepdim=True)),
    "linalg_vector_norm": _reduce(lambda x, dims, alive: torch.nansum(x.square(), dim=dims, keepdim=True).sqrt()),
    "var": _variance,
    "std": lambda *call: _variance(*call, root=True),
    "var_mean": lambda *call: _variance(*call, mean=True),
    "_softmax": _softmax,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_weight_norm_interface": _weight_norm,
}


def _same_where_alive(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=False)
    first = next(((x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor)), None)
    if first is None or first[0].shape != first[1].shape:
        return False
    x, y = first
    return bool(torch.allclose(x.masked_fill(y.isnan(), 0.0), torch.nan_to_num(y, 0.0), equal_nan=True))
