"""Differentiable k-means: weights become attention-weighted means of centroids that follow from the weights.

The centroids are a fixed point, so their derivative comes from the implicit function theorem (as in Jaffe, Singh and
Bullo 2023, arXiv 2312.07759), in closed form: no iteration is unrolled and nothing is kept for a backward pass. What
the paper bounds by limiting the iterations, a chunk of the weights at a time bounds here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.methods.latent import SCALED, Latent
from lightning_compress.methods.sharing import cluster
from lightning_compress.wording import require_choice

__all__ = ["KINDS", "MAX_BITS", "DifferentiableKMeans", "make_latent"]

MAX_BITS = 4
"""Logarithm of the most centroids: each step compares every weight with every centroid, several times."""

ROUNDS = 50
"""After so many rounds centroids are taken as they are; from those of the step before few are needed."""

CHUNK = 1 << 20
"""Weights that are compared with the centroids at a time."""

KINDS = (*SCALED, "dkm")
"""binary, xnor, ternary and ttq, see `latent`; dkm: `DifferentiableKMeans`."""


@dataclass(frozen=True)
class DifferentiableKMeans(Latent):
    """Soft assignments to centroids, then hard ones: DKM (Cho et al. 2021, arXiv 2108.12659).

    Each latent attends to the centroids by softmax(-|latent - centroid| / temperature), each centroid is the mean of
    the latents by this attention, and values are the means of the centroids by it. The memory is the temperature and
    the centroids; these start from the best clustering and follow the latents from where they were.

    Args:
        bits: logarithm of the number of centroids.
        tau: the temperature, as a multiple of the standard deviation that the weights have when training of latents
            begins, since that of layers differs.

    Example:
        >>> kind, weight = DifferentiableKMeans(1, 0.1), torch.tensor([[0.0, 0.2, 1.0, 1.2]])
        >>> latent, memory = kind.follow(weight, kind.begin(weight))
        >>> kind.values(latent, memory, hard=True)
        tensor([[0.1000, 0.1000, 1.1000, 1.1000]])
    """

    bits: int = 2
    tau: float = 0.05

    def begin(self, weight: Tensor) -> Tensor:
        """See `Latent`."""
        book = cluster(weight, 2**self.bits)[0]
        spread = weight.detach().std(correction=0).clamp_min(1e-12)
        centroids = book[1:] if len(book) > 1 else book  # the first is zero, the value of weights that are zero
        return torch.cat([(self.tau * spread).view(1), centroids])

    def values(self, latent: Tensor, memory: Tensor, hard: bool = False) -> Tensor:
        """See `Latent`."""
        centroids = memory[1:]
        parts = []
        for part in latent.reshape(-1).split(CHUNK):
            if hard:
                parts.append(centroids[(part[:, None] - centroids).abs().argmin(1)])
            else:
                parts.append((_attention(part, memory) * centroids).sum(1))
        return torch.cat(parts).view(latent.shape)

    def follow(self, latent: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `Latent`: the centroids move to their fixed point."""
        flat = latent.reshape(-1)
        enough = 100 * torch.finfo(latent.dtype).eps * float((flat.max() - flat.min()).clamp_min(1e-12))
        for _ in range(ROUNDS):
            centroids = _means(flat, memory)[0]
            moved = float((centroids - memory[1:]).abs().max())
            memory = torch.cat([memory[:1], centroids])
            if not moved > enough:
                break
        return latent, memory

    def gradient(self, latent: Tensor, memory: Tensor, gradient: Tensor) -> Tensor:
        """See `Latent`: that of the soft values, at a fixed point; it serves the hard values as an estimate."""
        flat, wanted = latent.reshape(-1), gradient.reshape(-1)
        with torch.autocast(latent.device.type, enabled=False):
            pull = _pull(flat, memory, wanted)
            parts = [
                _through(part, memory, slope, pull)
                for part, slope in zip(flat.split(CHUNK), wanted.split(CHUNK), strict=True)
            ]
        return torch.cat(parts).view(latent.shape)


def make_latent(kind: str, granularity: str | None = None, bits: int | None = None, tau: float | None = None) -> Latent:
    """The kind of a name.

    Args:
        kind: one of `KINDS`.
        granularity: what shares a scale, `layer` or `channel`; None: what the kind's paper has.
        bits: for `dkm`, logarithm of the number of values, from 1 to 4; None: 2.
        tau: for `dkm`, the temperature; None: 0.05.

    Raises:
        ValueError: an argument out of range, or of another kind.

    Example:
        >>> make_latent("ternary", "channel")
        TernaryWeightNetwork(granularity='channel')
        >>> make_latent("dkm", bits=9)
        Traceback (most recent call last):
        ValueError: `bits` must be from 1 to 4, got 9; for more use WeightSharing
    """
    require_choice("kind", kind, KINDS)
    known = SCALED[kind].granularities if kind in SCALED else Latent.granularities
    if granularity is not None and granularity not in known:
        raise ValueError(f"`granularity` of kind={kind!r} must be {' or '.join(known)}, got {granularity!r}")
    if kind in SCALED:
        for name, value in (("bits", bits), ("tau", tau)):
            if value is not None:
                raise ValueError(f"`{name}` goes with kind='dkm', got {name}={value!r} with kind={kind!r}")
        return SCALED[kind](granularity or known[0]) if len(known) > 1 else SCALED[kind]()  # type: ignore[call-arg]
    bits = DifferentiableKMeans.bits if bits is None else bits
    tau = DifferentiableKMeans.tau if tau is None else tau
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"`bits` must be from 1 to {MAX_BITS}, got {bits!r}; for more use WeightSharing")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau <= 1:
        raise ValueError(f"`tau` must be a temperature in (0, 1], in standard deviations of the weights, got {tau!r}")
    return DifferentiableKMeans(bits, float(tau))


def _attention(flat: Tensor, memory: Tensor) -> Tensor:
    """[weights, centroids], rows add up to 1."""
    return (-(flat[:, None] - memory[1:]).abs() / memory[0]).softmax(1)


def _means(flat: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the weights by the attention to each centroid, and the sum of this; unattended ones stay."""
    totals, shares = torch.zeros_like(memory[1:]), torch.zeros_like(memory[1:])
    for part in flat.split(CHUNK):
        attention = _attention(part, memory)
        totals += (attention * part[:, None]).sum(0)
        shares += attention.sum(0)
    found = shares > torch.finfo(flat.dtype).tiny
    return torch.where(found, totals / shares, memory[1:]), torch.where(found, shares, torch.inf)


def _slopes(part: Tensor, memory: Tensor) -> Tensor:
    """The derivative of what the softmax is of with respect to the centroids; minus that to the weights."""
    return (part[:, None] - memory[1:]).sign() / memory[0]


def _pull(flat: Tensor, memory: Tensor, gradient: Tensor) -> Tensor:
    """What a gradient at the values is at each centroid's mean, over the share of weights in it.

    Of the fixed point c = m(c, w) the derivative is (1 - dm/dc)^-1 dm/dw.
    """
    centroids = memory[1:]
    means, shares = _means(flat, memory)
    direct = torch.zeros_like(centroids)
    turned = torch.zeros(len(centroids), len(centroids), dtype=flat.dtype, device=flat.device)  # dm/dc
    for part, slope in zip(flat.split(CHUNK), gradient.split(CHUNK), strict=True):
        attention, slopes = _attention(part, memory), _slopes(part, memory)
        values = (attention * centroids).sum(1, keepdim=True)
        direct += (slope[:, None] * attention * (1 + slopes * (centroids - values))).sum(0)
        off = attention * (part[:, None] - means)
        turned += torch.diag((off * slopes).sum(0)) - off.T @ (attention * slopes)
    turned = (turned / shares[:, None]).double()
    whole = torch.eye(len(centroids), dtype=torch.float64, device=flat.device) - turned.T
    pull: Tensor = torch.linalg.solve_ex(whole, direct.double())[0]
    return pull.to(flat.dtype) / shares


def _through(part: Tensor, memory: Tensor, gradient: Tensor, pull: Tensor) -> Tensor:
    """The gradient at some weights: through their own attention, and through the centroids."""
    centroids = memory[1:]
    attention, slopes = _attention(part, memory), _slopes(part, memory)
    values = (attention * centroids).sum(1, keepdim=True)
    own = -(attention * slopes * (centroids - values)).sum(1)
    moved = (attention * slopes).sum(1, keepdim=True) - slopes
    shared = (attention * pull * (1 + (part[:, None] - centroids) * moved)).sum(1)
    return gradient * own + shared
