"""Compression of convolutional networks as Lightning callbacks: really smaller, honestly measured.

Example:
    >>> import lightning_compress
    >>> lightning_compress.Budget(macs=0.5).macs
    0.5
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.artifact import load_compressed, save_compressed
    from lightning_compress.budget import Budget
    from lightning_compress.callbacks.distillation import Distillation
    from lightning_compress.callbacks.factorization import LowRankFactorization
    from lightning_compress.callbacks.filters import CompactFilters
    from lightning_compress.callbacks.latent import LowBitWeights
    from lightning_compress.callbacks.pictures import FilterPictures
    from lightning_compress.callbacks.pruning import ChannelPruning
    from lightning_compress.callbacks.quantization import Quantization
    from lightning_compress.callbacks.report import CompressionReport
    from lightning_compress.callbacks.sharing import WeightSharing
    from lightning_compress.callbacks.weights import WeightPruning
    from lightning_compress.checkpoints import load_from_checkpoint
    from lightning_compress.distill.module import DistillationModule
    from lightning_compress.distill.mutual import MutualModule
    from lightning_compress.edits import apply_edits, history
    from lightning_compress.exporting import export
    from lightning_compress.footprint import Footprint, measure
    from lightning_compress.methods.factorization import factorize
    from lightning_compress.methods.filters import compact_filters
    from lightning_compress.methods.posttraining import quantize
    from lightning_compress.methods.pruning import prune_channels
    from lightning_compress.methods.reparameterization import expand, reparameterize
    from lightning_compress.methods.semi_structured import use_sparse_kernels

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChannelPruning",
    "CompactFilters",
    "CompressionReport",
    "Distillation",
    "DistillationModule",
    "FilterPictures",
    "Footprint",
    "LowBitWeights",
    "LowRankFactorization",
    "MutualModule",
    "Quantization",
    "WeightPruning",
    "WeightSharing",
    "apply_edits",
    "compact_filters",
    "expand",
    "export",
    "factorize",
    "history",
    "load_compressed",
    "load_from_checkpoint",
    "measure",
    "prune_channels",
    "quantize",
    "reparameterize",
    "save_compressed",
    "use_sparse_kernels",
]

# Names load where they are first used (PEP 562): whoever only loads an artifact pays for no Trainer.
_HOMES = {
    "Budget": "lightning_compress.budget",
    "ChannelPruning": "lightning_compress.callbacks.pruning",
    "CompactFilters": "lightning_compress.callbacks.filters",
    "CompressionReport": "lightning_compress.callbacks.report",
    "Distillation": "lightning_compress.callbacks.distillation",
    "DistillationModule": "lightning_compress.distill.module",
    "FilterPictures": "lightning_compress.callbacks.pictures",
    "Footprint": "lightning_compress.footprint",
    "LowBitWeights": "lightning_compress.callbacks.latent",
    "LowRankFactorization": "lightning_compress.callbacks.factorization",
    "MutualModule": "lightning_compress.distill.mutual",
    "Quantization": "lightning_compress.callbacks.quantization",
    "WeightPruning": "lightning_compress.callbacks.weights",
    "WeightSharing": "lightning_compress.callbacks.sharing",
    "apply_edits": "lightning_compress.edits",
    "compact_filters": "lightning_compress.methods.filters",
    "expand": "lightning_compress.methods.reparameterization",
    "export": "lightning_compress.exporting",
    "factorize": "lightning_compress.methods.factorization",
    "history": "lightning_compress.edits",
    "load_compressed": "lightning_compress.artifact",
    "load_from_checkpoint": "lightning_compress.checkpoints",
    "measure": "lightning_compress.footprint",
    "prune_channels": "lightning_compress.methods.pruning",
    "quantize": "lightning_compress.methods.posttraining",
    "reparameterize": "lightning_compress.methods.reparameterization",
    "save_compressed": "lightning_compress.artifact",
    "use_sparse_kernels": "lightning_compress.methods.semi_structured",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        # with these two Python itself says what was perhaps meant
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
