"""What a network does while it runs: whose operation it is, what it multiplies, what memory it takes.

Torch's counter has a formula for each product; here are those that it lacks. A complex multiplication is four real
ones. A Fourier transform of n complex numbers is 5 n log2(n) operations, of real ones half of that: the usual figure of
FFTs, and a multiply-accumulate is two operations.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_compress.calls import Call
from lightning_compress.edits import named_tensors

__all__ = ["COMPLEX", "Meter", "fft_macs"]

COMPLEX = 4
"""Real multiplications in a complex one."""

# Operations that make or move data without arithmetic; views are recognised by themselves.
_MOVES = re.compile(
    r"""
    (new_)? (empty | full | ones | zeros) (_strided | _like)? | arange | eye | scalar_tensor | fill | zero
    | rand | randn | rand_like | randn_like | randint | randperm | bernoulli | normal | uniform
    | clone | copy | _to_copy | resize | _unsafe_view | _local_scalar_dense | sym_.*
    | cat | stack | repeat | roll | flip | tril | triu | pixel_(un)?shuffle | channel_shuffle
    | (constant_pad_n | reflection_pad[123] | replication_pad[123] | upsample_nearest[123]) d
    | (_unsafe_)? index | index_(copy | put | select) | embedding | gather | take | nonzero | where
    | (select_ | slice_ | masked_)? scatter | masked_(fill | select)
    """,
    re.VERBOSE,
)


class Meter(TorchDispatchMode):
    """Sees every operation of a run: whose it is, what it multiplies, what memory it takes.

    Attributes:
        counter: torch's counter, which has a formula for each product.
        layers: module path -> multiply-accumulates of the operations that ran in that module itself.
        uncounted: operation -> output elements, where there is arithmetic and no formula.
        peak_memory: bytes of all storages that were alive at the worst moment.

    Args:
        model: the network that is run; it may be a skeleton.
        calls: what it is run on.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        super().__init__()
        self.model = model
        self.counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS, skip_unsupported=True)
        self.layers: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.peak_memory = 0
        self._memory = 0
        self._stack = [""]
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in [t for _, t in named_tensors(model)] + [t for call in calls for t in call.tensors()]:
            self._hold(tensor)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count what runs inside; the modules tell where they begin and end."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        try:
            with self.counter, self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        flops = self.counter.get_total_flops() - before
        tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if flops:
            self.layers[self._stack[-1]] += flops // 2
        elif tensors and _computes(func):
            name = str(getattr(func, "overloadpacket", func))
            self.uncounted[name.removesuffix("_")] += sum(tensor.numel() for tensor in tensors)
        for tensor in tensors:
            self._hold(tensor)
        return out

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._stack.append(name)

    def _leaving(self, *_: Any) -> None:
        self._stack.pop()

    def _hold(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return  # no single storage
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def release(_: Any) -> None:
            self._memory -= size
            self._alive.pop(key)

        self._alive[key] = weakref.ref(storage, release)
        self._memory += size
        self.peak_memory = max(self.peak_memory, self._memory)


def _computes(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return True
    name = func._schema.name.split("::")[-1].removesuffix("_")
    return not (func.is_view or _MOVES.fullmatch(name))


def _vector_flops(matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[-1] if len(matrix) > 1 else 2 * matrix[0]


def _added_vector_flops(_: Any, matrix: Sequence[int], vector: Sequence[int], *__: Any, **___: Any) -> int:
    return _vector_flops(matrix, vector)


def _added_batch_flops(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def fft_macs(numbers: int, length: int, real: bool = True) -> float:
    """Multiply-accumulates of Fourier transforms.

    Args:
        numbers: how many numbers are transformed in all.
        length: of one transform.
        real: whether they are real on one side.
    """
    return (1.25 if real else 2.5) * numbers * math.log2(max(length, 1))


def _fft_flops(x: Tensor, dims: Sequence[int], *_: Any, out_val: Tensor, **__: Any) -> int:
    whole = out_val if x.is_complex() else x  # of a real transform, the side that has all numbers
    length = math.prod(whole.shape[dim] for dim in dims)
    return round(2 * fft_macs(whole.numel(), length, real=not (x.is_complex() and out_val.is_complex())))


def _complex_too(product: Any) -> Callable[..., int]:
    def flops(*args: Any, **kwargs: Any) -> int:
        found: int = flop_registry[product](*args, **kwargs)
        return found * (COMPLEX if any(isinstance(a, Tensor) and a.is_complex() for a in args) else 1)

    return _raw(flops)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula that is given tensors instead of shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


_aten = torch.ops.aten

# Products that torch has no formula for: without a batch dim, `linear` and `@` end here.
_FORMULAS = {
    **{product: _complex_too(product) for product in (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm)},
    **{transform: _raw(_fft_flops) for transform in (_aten._fft_r2c, _aten._fft_c2r, _aten._fft_c2c)},
    _aten.mv: _vector_flops,
    _aten.dot: _vector_flops,
    _aten.vdot: _vector_flops,
    _aten.addmv: _added_vector_flops,
    _aten.addbmm: _added_batch_flops,
}
