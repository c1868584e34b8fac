"""Criteria of weight pruning: how much each weight matters, as pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["AT_START", "CRITERIA", "GATHERED", "SIGNED", "bury", "gather", "score"]

CRITERIA = ("magnitude", "taylor", "movement", "snip", "grasp", "wanda", "random")
"""magnitude: |w| (Han et al. 2015, arXiv 1506.02626). taylor: squared first-order change of the loss, (w g)^2, summed
over steps (Molchanov et al. 2019, arXiv 1906.10771). movement: how far weights move away from zero, the sum of -w g
(Sanh et al. 2020, arXiv 2005.07683). snip: |w g| on the first batch, before the first step (Lee et al. 2019, arXiv
1810.02340). grasp: w (H g), before the first step too: the weights stay whose removal would cost the most gradient flow
(Wang et al. 2020, arXiv 2002.07376). wanda: |w| times the norm of the input that it meets (Sun et al. 2023, arXiv
2306.11695). random: as a baseline."""

GATHERED = ("taylor", "movement", "snip", "grasp")
"""Those that are made of derivatives of the loss."""

AT_START = ("snip", "grasp")
"""Those that prune an untrained network, once."""

SIGNED = ("movement", "grasp")
"""Those whose scores may be negative."""


def gather(criterion: str, weight: Tensor, gradient: Tensor, before: Tensor | None) -> Tensor:
    """Add a step's gradient to the scores of a criterion.

    Args:
        criterion: `taylor`, `movement` or `snip`.
        weight: the weight.
        gradient: of the loss.
        before: the sum so far; None at first.
    """
    change = (weight.detach() * gradient.detach()).float().nan_to_num(0.0, 0.0, 0.0)  # of steps that are skipped
    term = {"taylor": change.square(), "movement": -change, "snip": change.abs()}[criterion]
    return term if before is None else before + term


def score(
    criterion: str, weight: Tensor, norm: Tensor | None = None, gathered: Tensor | None = None, seed: int = 0
) -> Tensor:
    """How much each weight matters; larger ones stay.

    Args:
        criterion: one of `CRITERIA`.
        weight: the weight.
        norm: for `wanda`, that of each input; None: they count alike.
        gathered: for those in `GATHERED`, the sum over steps; for `grasp`, the Hessian times the gradient.
        seed: for `random`.

    Raises:
        ValueError: nothing was gathered for this weight, or what was is not finite.

    Example:
        >>> score("wanda", torch.tensor([[1.0, -2.0]]), norm=torch.tensor([3.0, 1.0]))
        tensor([[3., 2.]])
    """
    size = weight.detach().abs().float()
    if criterion == "random":
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(size.device)
    if criterion == "wanda" and norm is not None:
        return size * norm.view(1, -1, *[1] * (size.dim() - 2))
    if criterion in GATHERED:
        if gathered is None or gathered.shape != weight.shape:
            raise ValueError(
                "no gradient has reached it before the first edit; let `start` be later, or name it in `exclude`"
            )
        if criterion == "grasp":
            if not gathered.isfinite().all():
                raise ValueError("the second derivatives of the loss are not finite; train in another precision")
            return weight.detach().float() * gathered.to(size.device)
        return gathered.to(size.device)
    return size


def bury(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same scores with those of dead weights below all others; where no score is negative, zero is.

    Args:
        scores: name -> scores.
        masks: name -> where weights are alive; of those that have a mask already.
    """
    least = min((float(value.min()) for value in scores.values()), default=0.0)
    lowest = least - 1.0 if least < 0 else 0.0
    return {n: torch.where(masks[n].bool(), value, lowest) if n in masks else value for n, value in scores.items()}
