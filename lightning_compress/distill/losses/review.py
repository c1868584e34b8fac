"""Knowledge review: the student's deeper layers together learn the teacher's shallower ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from lightning_compress.distill.losses.base import DistillationLoss, check_same_shape, full_precision, pooled

__all__ = ["ReviewKD", "hierarchical_context", "reviewkd"]

# Both of the released code.
_WIDEST = 512
_GRIDS = (4, 2, 1)


@full_precision
def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of two feature maps, as they are and averaged to 4x4, 2x2 and 1x1.

    Each coarser grid weighs half of the one before; grids that are not smaller than the maps are left out.

    Args:
        student: features [N, C, H, W].
        teacher: features [N, C, H, W].

    Returns:
        The weighted mean of the squared errors, a scalar.

    Raises:
        ValueError: other shapes.

    Example:
        >>> import torch
        >>> hierarchical_context(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)).item()
        1.0
    """
    if student.dim() != 4:
        raise ValueError(f"ReviewKD compares feature maps [N, C, H, W], got {tuple(student.shape)}")
    check_same_shape("ReviewKD", student, teacher, "its projector makes them")
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for side in _GRIDS:
        if side < min(student.shape[2:]):
            weight /= 2
            weights += weight
            total = total + weight * F.mse_loss(pooled(student, [side, side]), pooled(teacher, [side, side]))
    return total / weights


def reviewkd(student: Sequence[Tensor], teacher: Sequence[Tensor], target: Tensor | None = None) -> Tensor:
    """The sum of `hierarchical_context` over the layers.

    Args:
        student: features [N, C, H, W] of each layer, after fusion.
        teacher: features of the same shapes.
        target: not used.

    Raises:
        ValueError: other numbers of layers, other shapes.

    Example:
        >>> import torch
        >>> reviewkd([torch.ones(2, 3, 8, 8)] * 2, [torch.zeros(2, 3, 8, 8)] * 2).item()
        2.0
    """
    _check_layers(student, teacher)
    pairs = zip(student, teacher, strict=True)
    return torch.stack([hierarchical_context(ours, theirs) for ours, theirs in pairs]).sum()


class ReviewKD(DistillationLoss):
    """Distillation by knowledge review (Chen et al. 2021, arXiv 2104.09044).

    Takes several layers of both networks at once, from the shallowest to the deepest. The projector goes through the
    student's from the deepest back, fuses each with what came before by learnt attention, and makes of it what the
    teacher's layer of the same rank is compared with. Features [N, C], as after the last pooling, count as maps of one
    pixel. The projector has batch norms: as long as it trains, it needs more than one sample where a map has one pixel.

    Example:
        >>> import torch
        >>> loss = ReviewKD()
        >>> student = [torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)]
        >>> teacher = [torch.zeros(2, 6, 8, 8), torch.zeros(2, 12, 4, 4)]
        >>> fusion = loss.projector([f.shape for f in student], [f.shape for f in teacher])
        >>> [tuple(f.shape) for f in fusion(student, teacher)[0]]
        [(2, 6, 8, 8), (2, 12, 4, 4)]
        >>> loss(*fusion(student, teacher)).shape
        torch.Size([])
    """

    joint: ClassVar[bool] = True

    def projector(self, student: Sequence[Size], teacher: Sequence[Size]) -> nn.Module:
        """Attention-based fusion modules, one for each layer."""
        _check_layers(student, teacher)
        for shape in (*student, *teacher):
            if len(shape) not in (2, 4):
                raise ValueError(
                    f"ReviewKD takes features [N, C, H, W] or [N, C], got {tuple(shape)} among student "
                    f"{[tuple(s) for s in student]} and teacher {[tuple(s) for s in teacher]}"
                )
        return _Fusions([shape[1] for shape in student], [shape[1] for shape in teacher])

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: Tensor | None = None) -> Tensor:
        """See `reviewkd`."""
        _check_layers(student, teacher)
        return reviewkd(student, [features.detach() for features in teacher], target)


def _check_layers(student: Sequence[object], teacher: Sequence[object]) -> None:
    for side in (student, teacher):
        if isinstance(side, Tensor | Size) or not side:
            raise ValueError("ReviewKD takes lists of features: name the layers of both sides, shallowest first")
    if len(student) != len(teacher):
        raise ValueError(
            f"ReviewKD compares layers in pairs, got {len(student)} of the student and {len(teacher)} of the teacher"
        )


class _Fusions(nn.Module):
    """The student's features, deepest first, each fused with the one before; in the order and shapes of the teacher."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        middle = min(_WIDEST, student[-1])
        last = len(student) - 1
        self.blocks = nn.ModuleList(
            _Fusion(ours, middle, theirs, fuse=rank < last)
            for rank, (ours, theirs) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        targets = [_as_map(features) for features in teacher]
        outputs: list[Tensor] = []
        deeper: Tensor | None = None
        for block, features, wanted in reversed(list(zip(self.blocks, student, targets, strict=True))):
            output, deeper = block(_as_map(features), deeper, wanted.shape[2:])
            outputs.insert(0, output)
        return outputs, targets


class _Fusion(nn.Module):
    """One layer's features with what the deeper layers gave, mixed by an attention map for each."""

    def __init__(self, student: int, middle: int, teacher: int, fuse: bool) -> None:
        super().__init__()
        reduce = nn.Conv2d(student, middle, 1, bias=False)
        expand = nn.Conv2d(middle, teacher, 3, padding=1, bias=False)
        for layer in (reduce, expand):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, features: Tensor, deeper: Tensor | None, size: Size) -> tuple[Tensor, Tensor]:
        x = self.reduce(features)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            own, others = self.attention(torch.cat([x, deeper], 1)).split(1, 1)
            x = x * own + deeper * others
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.dim() == 2 else features
