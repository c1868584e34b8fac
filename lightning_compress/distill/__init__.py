"""Knowledge distillation: losses, teachers, and the engine that the callbacks and the LightningModules share.

Example:
    >>> from lightning_compress.distill import Term
    >>> from lightning_compress.distill.losses import FitNet
    >>> Term(FitNet(), weight=100, student="layer2").pairs
    (('layer2', 'layer2'),)
"""

from __future__ import annotations

from lightning_compress.distill.engine import DistillationError
from lightning_compress.distill.exits import EarlyExit
from lightning_compress.distill.teachers import Teacher
from lightning_compress.distill.terms import Term

__all__ = ["DistillationError", "EarlyExit", "Teacher", "Term"]
