"""What the callbacks tell the Trainer's loggers: the one place where their names are chosen.

Everything is under `compress/`: `compress/macs` is what the network costs, from dense to final, so that its last value
is the final figure; beside it `compress/dense/macs` and `compress/ratio/macs`, and so on for each figure of `Results`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from lightning_compress.footprint import Footprint
from lightning_compress.results import LayerRow, Results

__all__ = ["begin_curves", "final_figures", "log_costs", "log_picture", "log_results"]

PREFIX = "compress"
CURVES = ("params", "macs", "bytes", "sparsity")
"""What a network costs at any time of its training, by the names that `Footprint` and `Results` have for it."""


def begin_curves(trainer: pl.Trainer, *metrics: str) -> None:
    """Tell W&B that these metrics, and what a network costs, are to be seen over epochs.

    Each by its name: where W&B's patterns overlap (Lightning has `*` over steps), the one that counts is left to
    chance. And without a kind of summary: `last`, though it is what one gets, would move the value from `compress/macs`
    to `compress/macs.last`.

    Args:
        trainer: a Trainer that fits.
        metrics: as the LightningModule logs them.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for name in (*metrics, *(f"{PREFIX}/{name}" for name in CURVES)):
                logger.experiment.define_metric(name, step_metric="epoch")


def log_costs(trainer: pl.Trainer, footprint: Footprint) -> None:
    """Log what the network costs now: a step of the stairs from dense to compressed.

    Args:
        trainer: a Trainer that fits.
        footprint: of the network as it is.
    """
    costs = {name: getattr(footprint, name) for name in CURVES}
    _log(trainer, {f"{PREFIX}/{name}": value for name, value in costs.items() if value is not None})


def log_results(trainer: pl.Trainer, results: Results) -> None:
    """Log what a compression came to, and to W&B the table of its layers.

    Args:
        trainer: a Trainer that has fitted.
        results: what was measured.
    """
    _log(trainer, final_figures(results.figures()))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and results.layers:
            columns = ["tensor", "before", "after", "macs before", "macs after"]
            logger.log_table(f"{PREFIX}/layers", columns, [_cells(row) for row in results.layers])


def final_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of a report under the names that loggers know.

    Args:
        figures: `Results.figures()`.

    Returns:
        The compressed network's right under `compress/` (the dense one's, where nothing was compressed, so that
        baselines can be plotted beside the others); and the dense one's, the ratios and the differences below.

    Example:
        >>> final_figures({"dense/macs": 40, "compressed/macs": 10, "ratio/macs": 0.25})
        {'compress/macs': 10, 'compress/dense/macs': 40, 'compress/ratio/macs': 0.25}
    """
    own = {
        f"{PREFIX}/{name.partition('/')[2]}": value
        for side in ("dense/", "compressed/")
        for name, value in figures.items()
        if name.startswith(side)
    }
    beside = {f"{PREFIX}/{name}": value for name, value in figures.items() if not name.startswith("compressed/")}
    return own | beside


def log_picture(trainer: pl.Trainer, name: str, image: Image.Image) -> None:
    """Show a picture where a logger can.

    Args:
        trainer: a Trainer with loggers.
        name: its name below `compress/`.
        image: the picture.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            import numpy as np

            logger.experiment.add_image(f"{PREFIX}/{name}", np.asarray(image), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"{PREFIX}/{name}", [image])


def _log(trainer: pl.Trainer, figures: Mapping[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({**figures, "epoch": trainer.current_epoch}, step=trainer.global_step)


def _cells(row: LayerRow) -> list[str | int | None]:
    return [row.tensor, _shape(row.before), _shape(row.after), row.macs_before, row.macs_after]


def _shape(shape: Sequence[int] | None) -> str | None:
    return None if shape is None else "×".join(map(str, shape))
