"""Losses between feature maps [N, C, ...] of two layers, place by place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor, nn

from lightning_compress.distill.losses.base import (
    DistillationLoss,
    check_features,
    check_same_shape,
    full_precision,
    same_grid,
    unit,
)

__all__ = ["AT", "BlockMSE", "FitNet", "at", "block_mse", "fitnet"]

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


@full_precision
def fitnet(student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean squared difference of features; the larger map is first averaged to the smaller one's spatial size.

    Args:
        student: features [N, C, ...].
        teacher: features [N, C, ...].
        target: not used.

    Raises:
        ValueError: other numbers of dims, samples or channels.

    Example:
        >>> import torch
        >>> fitnet(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)).item()
        1.0
    """
    check_features("FitNet", student, teacher)
    student, teacher = same_grid(student, teacher)
    check_same_shape("FitNet", student, teacher, "its projector brings the student to the teacher's channels")
    return F.mse_loss(student, teacher)


@full_precision
def at(student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean squared difference of the attention maps.

    A map is the mean of the squared features over the channels, flattened, divided by its norm. The larger features
    are first averaged to the smaller ones' spatial size. As in the released code; the paper's formula has the norm of
    the difference instead.

    Args:
        student: features [N, C, H, W], or with another number of spatial dims.
        teacher: the same; the channels may be others.
        target: not used.

    Raises:
        ValueError: no spatial dims, other numbers of dims or samples.

    Example:
        >>> import torch
        >>> f = torch.tensor([[[[1.0, 0.0]]]])
        >>> at(f, f.flip(3)).item()
        1.0
    """
    check_features("AT", student, teacher, least=3)
    ours, theirs = (unit(side.square().mean(1).flatten(1)) for side in same_grid(student, teacher))
    return F.mse_loss(ours, theirs)


@full_precision
def block_mse(student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """Mean squared difference of two outputs of the same shape.

    Args:
        student: output [N, ...].
        teacher: output [N, ...].
        target: not used.

    Raises:
        ValueError: other shapes.

    Example:
        >>> import torch
        >>> block_mse(torch.ones(2, 3), torch.zeros(2, 3)).item()
        1.0
    """
    check_same_shape("BlockMSE", student, teacher, "for a narrower student take FitNet")
    return F.mse_loss(student, teacher)


class FitNet(DistillationLoss):
    """Hints: regression of the teacher's features (Romero et al. 2015, arXiv 1412.6550).

    Where the channels differ, a 1x1 convolution (a linear layer for features [N, C]) is learnt that brings the
    student's to the teacher's; where the spatial sizes differ, the larger map is averaged.

    Example:
        >>> import torch
        >>> loss = FitNet()
        >>> projector = loss.projector(torch.Size([2, 3, 4, 4]), torch.Size([2, 5, 8, 8]))
        >>> projector.layer
        Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1))
        >>> loss(*projector(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 8, 8))).shape
        torch.Size([])
    """

    def projector(self, student: Size, teacher: Size) -> nn.Module | None:
        """The layer from the student's channels to the teacher's; None where they are the same."""
        if len(student) != len(teacher) or not 2 <= len(student) <= 5:
            raise ValueError(
                f"no projector can join student {tuple(student)} and teacher {tuple(teacher)}: FitNet takes features "
                "[N, C] or [N, C, ...] with 1 to 3 spatial dims, and as many dims on both sides; name other layers"
            )
        return None if student[1] == teacher[1] else _Regressor(len(student), student[1], teacher[1])

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `fitnet`."""
        return fitnet(student, teacher.detach(), target)


class AT(DistillationLoss):
    """Attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928).

    Needs no projector: the channels may differ.

    Example:
        >>> import torch
        >>> f = torch.tensor([[[[1.0, 0.0]]]])
        >>> AT()(f, f.flip(3)).item()
        1.0
    """

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `at`."""
        return at(student, teacher.detach(), target)


class BlockMSE(DistillationLoss):
    """Squared error of a block's output, for students whose blocks have the teacher's shapes.

    What a block-wise reconstruction minimises (Li et al. 2021, arXiv 2102.05426).

    Example:
        >>> import torch
        >>> BlockMSE()(torch.ones(2, 3), torch.zeros(2, 3)).item()
        1.0
    """

    def projector(self, student: Size, teacher: Size) -> None:
        """None: nothing is learnt. Raises ValueError where the shapes differ."""
        if student != teacher:
            raise ValueError(
                f"BlockMSE needs features of one shape, got student {tuple(student)} and teacher {tuple(teacher)}: for "
                "a narrower student take FitNet"
            )

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """See `block_mse`."""
        return block_mse(student, teacher.detach(), target)


class _Regressor(nn.Module):
    """The student's features in the teacher's channels, place by place."""

    def __init__(self, dims: int, student: int, teacher: int) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(student, teacher) if dims == 2 else _CONVOLUTIONS[dims](student, teacher, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(student), teacher
