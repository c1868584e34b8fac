"""Low-rank factorization in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, get_args

from lightning_compress.budget import Budget
from lightning_compress.callbacks.replacement import LayerReplacement
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.factorization import ORIGIN, Rank, check_rank, low_rank_forms, plan_ranks
from lightning_compress.methods.measured import Stopwatch
from lightning_compress.methods.planning import Allocation, Planner
from lightning_compress.methods.sequential import Planned
from lightning_compress.wording import require_choice

__all__ = ["LowRankFactorization"]


class LowRankFactorization(LayerReplacement):
    """Factorize layers to low rank during training until the network fits a budget.

    Each layer becomes a chain of cheaper ones, fitted in closed form to give the layer's outputs on calibration data,
    one layer after another on what the factorized ones before it give; ranks are shared out over all layers by what
    their outputs lose for what they save. The rest of training recovers; `Distillation(teacher="self")` beside it
    helps. Networks keep most of their accuracy with no training at all, so one edit is the default.

    Args:
        budget: what may be left; None: `rank` says it.
        decomposition: `spatial` (k x 1 and 1 x k, Jaderberg et al. 2014, arXiv 1405.3866), `channel` (fewer channels
            and back, Zhang et al. 2015, arXiv 1505.06798), `tucker` (Kim et al. 2015, arXiv 1511.06530) or `cp`
            (Lebedev et al. 2014, arXiv 1412.6553). Linear layers and pointwise convolutions are always split in two.
        rank: without a budget, a rule for each layer: `energy:0.95`, `vbmf`, one rank, or path -> rank.
        round_to: ranks above this are multiples of it, unless `rank` gives them: other widths are slow.
        allocation: how a budget is shared out: `greedy` or `uniform`.
        init: where new weights come from: `data`, `weights` or `random`.
        samples: number of calibration samples.
        start: when the first edit is made: a float is a fraction of training, an integer an epoch.
        end: when the last edit is made, likewise.
        steps: number of edits. With more than one, ranks fall from edit to edit (with a budget), or a few layers are
            factorized at a time (with a rank).
        schedule: how the amount grows over them: `one_shot`, `linear`, `cubic`.
        exclude: patterns of layers that stay.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> LowRankFactorization(Budget(macs=0.5), decomposition="svd")
        Traceback (most recent call last):
        ValueError: `decomposition` must be one of spatial, channel, tucker, cp, got 'svd'
    """

    origin: ClassVar[str] = ORIGIN

    def __init__(
        self,
        budget: Budget | None = None,
        decomposition: str = "spatial",
        rank: Rank | None = None,
        round_to: int = 8,
        allocation: Allocation = "greedy",
        init: Init = "data",
        samples: int = 512,
        start: float | int = 0.0,
        end: float | int = 0.5,
        steps: int = 1,
        schedule: str = "one_shot",
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__(
            budget,
            init=init,
            samples=samples,
            exclude=exclude,
            start=start,
            end=end,
            steps=steps,
            schedule=schedule,
            network=network,
        )
        if (budget is None) == (rank is None):
            raise ValueError(f"give either `budget` or `rank`, got budget={budget!r} and rank={rank!r}")
        if rank is not None:
            check_rank(rank)
        require_choice("allocation", allocation, get_args(Allocation))
        low_rank_forms(decomposition, round_to)
        self.decomposition, self.rank, self.round_to, self.allocation = decomposition, rank, round_to, allocation

    def forms(self) -> list[Form]:
        """See `LayerReplacement`."""
        return low_rank_forms(self.decomposition, self.round_to)

    def everything(self, planner: Planner) -> list[Planned]:
        """See `LayerReplacement`."""
        assert self.rank is not None
        return plan_ranks(planner, self.rank)

    def within(self, planner: Planner, limits: Mapping[str, float], stopwatch: Stopwatch | None) -> list[Planned]:
        """See `LayerReplacement`."""
        return planner.within(limits, self.allocation, stopwatch)
