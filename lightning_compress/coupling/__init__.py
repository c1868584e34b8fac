"""Coupling: which slices of which tensors must be kept or cut together, by label propagation over aten ops."""

from lightning_compress.coupling import movement as _movement  # noqa: F401  (registers its rules)
from lightning_compress.coupling import products as _products  # noqa: F401  (likewise)
from lightning_compress.coupling.graph import Coupling, Group, Location, Mask, trace_coupling
from lightning_compress.coupling.proof import Fault, Proof, prove
from lightning_compress.coupling.settle import Settled, settle

__all__ = ["Coupling", "Fault", "Group", "Location", "Mask", "Proof", "Settled", "prove", "settle", "trace_coupling"]
