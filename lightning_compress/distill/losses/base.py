"""What all losses share: the protocol, full precision, checks of options and shapes, division that survives zero."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DistillationLoss"]

P = ParamSpec("P")
Compared = Callable[Concatenate[Tensor, Tensor, P], Tensor]

# Rounding in a mean or a norm stays below this many units in the last place.
_ROUNDING = 8

_POOLS: dict[int, Callable[..., Tensor]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}


class DistillationLoss(nn.Module, ABC):
    """A scalar that says how far a student is from its teacher: called as `loss(student, teacher, target)`.

    Losses compute in float32 (float64 where that comes in), whatever the features' dtype and with autocast off. The
    teacher's side gets no gradient.

    Attributes:
        needs_target: whether `forward` needs the labels.
        joint: whether student and teacher are lists of features, all layers at once.

    Example:
        >>> from lightning_compress.distill.losses import KD
        >>> KD(temperature=2.0)
        KD(temperature=2.0, standardize=False)
        >>> KD().needs_target, KD().joint
        (False, False)
    """

    needs_target: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    def projector(self, student: Any, teacher: Any) -> nn.Module | None:
        """Layers to learn that bring both sides into one shape; called once, before training.

        Args:
            student: shape of the student's features, batch first; a list of shapes where `joint`.
            teacher: the same for the teacher.

        Returns:
            A module from (student, teacher) to what `forward` takes; None if nothing has to be learnt.

        Raises:
            ValueError: nothing can join the shapes.

        Example:
            >>> import torch
            >>> from lightning_compress.distill.losses import FitNet
            >>> FitNet().projector(torch.Size([2, 4, 8, 8]), torch.Size([2, 4, 8, 8])) is None
            True
        """
        return None

    @abstractmethod
    def forward(self, student: Any, teacher: Any, target: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            student: what the student gave; gradients go there.
            teacher: what the teacher gave.
            target: labels [N], for losses that use them.

        Raises:
            ValueError: shapes that do not go together, or no labels where they are needed.
        """

    def extra_repr(self) -> str:
        """The options, as they are given to the constructor."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))


def full_precision(function: Compared[P]) -> Compared[P]:
    """Call `function` on at least float32, with autocast off."""

    @functools.wraps(function)
    def wrapper(student: Tensor, teacher: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.amp.autocast(student.device.type, enabled=False):
            return function(student.to(dtype), teacher.to(dtype), *args, **kwargs)

    return wrapper


def above_zero(name: str, value: float) -> float:
    """The option as a float; ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be above 0, got {value!r}")
    return float(value)


def at_least_zero(name: str, value: float) -> float:
    """The option as a float; ValueError unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}")
    return float(value)


def boolean(name: str, value: bool) -> bool:
    """The option; ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}")
    return value


def check_same_batch(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both sides hold as many samples."""
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{loss} compares the same samples, got {student.shape[0]} from the student and {teacher.shape[0]} from "
            "the teacher"
        )


def check_features(loss: str, student: Tensor, teacher: Tensor, least: int = 2) -> None:
    """Raise ValueError unless both are features [N, C, ...] with as many dims and samples.

    Args:
        loss: what messages call the loss.
        student: features of the student.
        teacher: features of the teacher.
        least: how many dims are needed.
    """
    if student.dim() != teacher.dim() or student.dim() < least:
        form = "[N, C, ...]" if least == 2 else "[N, C, H, W] (or another number of spatial dims)"
        raise ValueError(
            f"{loss} compares features {form} with as many dims on both sides, got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}: name other layers"
        )
    check_same_batch(loss, student, teacher)


def check_same_shape(loss: str, student: Tensor, teacher: Tensor, way_out: str) -> None:
    """Raise ValueError, ending in `way_out`, unless both shapes are equal."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss} needs features of one shape, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}: {way_out}"
        )


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two feature maps [N, C, ...] down to the smaller one's spatial size, dim by dim."""
    size = [min(ours, theirs) for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return pooled(student, size), pooled(teacher, size)


def pooled(features: Tensor, size: list[int]) -> Tensor:
    """Features [N, C, ...] averaged to the given spatial size; unchanged where they have it.

    Raises:
        ValueError: more spatial dims than 3.
    """
    if list(features.shape[2:]) == size:
        return features
    if features.dim() not in _POOLS:
        raise ValueError(f"features with 1 to 3 spatial dims can be averaged, got {tuple(features.shape)}")
    return _POOLS[features.dim()](features, size)


def deviations(x: Tensor) -> Tensor:
    """Values minus their mean (last dim); 0, without gradient, where all values are equal but for rounding."""
    centred = x - x.mean(-1, keepdim=True)
    noise = _ROUNDING * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    varies = torch.linalg.vector_norm(centred.detach(), dim=-1, keepdim=True) > noise
    return torch.where(varies, centred, 0.0)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Vectors (last dim) divided by their norms, or by eps if that is larger; zeros stay zeros, without gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm.clamp(min=eps), 0.0)
