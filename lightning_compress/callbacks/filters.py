"""Compact filters in a Lightning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_compress.budget import Budget
from lightning_compress.callbacks.replacement import LayerReplacement
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.filters import ORIGIN, compact_form
from lightning_compress.methods.planning import Planner
from lightning_compress.methods.sequential import Planned

__all__ = ["CompactFilters"]


class CompactFilters(LayerReplacement):
    """Replace layers during training by those of compact architectures, made from the trained weights.

    Each new layer is fitted in closed form to give the old one's outputs on calibration data, one layer after another
    on what those before it give; nothing is trained from scratch. The rest of training recovers;
    `Distillation(teacher="self")` beside it helps.

    Args:
        operator: what layers become: `depthwise_separable` (Howard et al. 2017, arXiv 1704.04861), `ghost` (Han et al.
            2019, arXiv 1911.11907), `fire` (Iandola et al. 2016, arXiv 1602.07360), `grouped_shuffle` (Zhang et al.
            2017, arXiv 1707.01083), `crelu` (Shang et al. 2016, arXiv 1603.05201), `rotated` (Cohen and Welling 2016,
            arXiv 1602.07576), `circulant` (Cheng et al. 2015, arXiv 1502.03436) or `hashed` (Chen et al. 2015, arXiv
            1504.04788); the last two are for linear layers, too.
        budget: replace no more layers than this needs, those first that lose least for what they save; None: all that
            get cheaper.
        options: of the operator, see `compact_form`: `rank`, `ratio`, `groups`, `block`, ...
        init: where new weights come from: `data`, `weights` or `random`.
        samples: number of calibration samples.
        start: when the first edit is made: a float is a fraction of training, an integer an epoch.
        end: when the last edit is made, likewise.
        steps: number of edits: with more than one, a few layers are replaced at a time.
        schedule: how many by when: `one_shot`, `linear`, `cubic`.
        exclude: patterns of layers that stay.
        network: dotted name of the network inside the LightningModule; by default it is found.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> CompactFilters("mobile")
        Traceback (most recent call last):
        ValueError: `operator` must be one of depthwise_separable, ...
    """

    origin: ClassVar[str] = ORIGIN

    def __init__(
        self,
        operator: str = "depthwise_separable",
        budget: Budget | None = None,
        options: Mapping[str, Any] | None = None,
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
        self.operator, self.options = operator, dict(options or {})
        compact_form(operator, **self.options)

    def forms(self) -> list[Form]:
        """See `LayerReplacement`."""
        return [compact_form(self.operator, **self.options)]

    def everything(self, planner: Planner) -> list[Planned]:
        """See `LayerReplacement`."""
        return planner.everything(lambda _, candidates: candidates[0])
