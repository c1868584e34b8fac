"""Losses of knowledge distillation: modules with options, and the pure functions that they call.

Example:
    >>> import torch
    >>> from lightning_compress.distill.losses import DKD
    >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    >>> DKD(beta=2.0)(logits, logits, labels).item()
    0.0
"""

from __future__ import annotations

from lightning_compress.distill.losses.base import DistillationLoss
from lightning_compress.distill.losses.contrastive import CRD, crd
from lightning_compress.distill.losses.correlations import DIST, MLKD, dist, mlkd
from lightning_compress.distill.losses.decoupled import DKD, NKD, dkd, nkd
from lightning_compress.distill.losses.features import AT, BlockMSE, FitNet, at, block_mse, fitnet
from lightning_compress.distill.losses.logits import KD, LogitMSE, kd, logit_mse, standardized
from lightning_compress.distill.losses.relations import PKT, RKD, SP, pkt, rkd, sp
from lightning_compress.distill.losses.review import ReviewKD, hierarchical_context, reviewkd

__all__ = [
    "AT",
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "PKT",
    "RKD",
    "SP",
    "BlockMSE",
    "DistillationLoss",
    "FitNet",
    "LogitMSE",
    "ReviewKD",
    "at",
    "block_mse",
    "crd",
    "dist",
    "dkd",
    "fitnet",
    "hierarchical_context",
    "kd",
    "logit_mse",
    "mlkd",
    "nkd",
    "pkt",
    "reviewkd",
    "rkd",
    "sp",
    "standardized",
]
