"""What layers may become: low-rank chains, and the layers of compact architectures.

Compact architectures were made to be trained from scratch. Here each of their layers is the best approximation, near
enough, of what a trained layer does.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_compress.methods.approximation import Form
from lightning_compress.methods.forms.circulant import Circulant
from lightning_compress.methods.forms.cp import CP
from lightning_compress.methods.forms.crelu import CReLU
from lightning_compress.methods.forms.depthwise_separable import DepthwiseSeparable
from lightning_compress.methods.forms.fire import Fire
from lightning_compress.methods.forms.ghost import Ghost
from lightning_compress.methods.forms.grouped_shuffle import GroupedShuffle
from lightning_compress.methods.forms.hashed import Hashed
from lightning_compress.methods.forms.low_rank import Channel, Decomposition, Spatial, Tucker
from lightning_compress.methods.forms.rotated import Rotated

__all__ = [
    "COMPACT",
    "CP",
    "DECOMPOSITIONS",
    "CReLU",
    "Channel",
    "Circulant",
    "Decomposition",
    "DepthwiseSeparable",
    "Fire",
    "Ghost",
    "GroupedShuffle",
    "Hashed",
    "Rotated",
    "Spatial",
    "Tucker",
]

DECOMPOSITIONS: Mapping[str, Decomposition] = {form.name: form for form in (Spatial(), Channel(), Tucker(), CP())}
"""Name -> form of low rank."""

COMPACT: Mapping[str, type[Form]] = {
    form.name: form for form in (DepthwiseSeparable, Ghost, Fire, GroupedShuffle, CReLU, Rotated, Circulant, Hashed)
}
"""Name -> form of compact filters."""
