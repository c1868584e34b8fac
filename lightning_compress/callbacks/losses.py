"""The loss of a LightningModule's `training_step`, for what differentiates it otherwise than training does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_compress.callbacks.capture import batches, run_step
from lightning_compress.callbacks.dry import dry_step
from lightning_compress.calls import Call, batch_size

__all__ = ["visit_losses"]


def visit_losses(trainer: pl.Trainer, module: pl.LightningModule, samples: int, see: Callable[[Tensor], None]) -> None:
    """Run `training_step` on batches at fixed places of the training data, and see each loss with its graph.

    The step is that of the module's class: what other callbacks have wrapped around it is left out. The same batches,
    and the same random numbers, each time and on every rank; what the steps leave behind is put back.

    Args:
        trainer: the Trainer, with its training data set up.
        module: its LightningModule, with automatic optimization.
        samples: least number of samples, if the data has as many.
        see: called with the loss of each batch.

    Raises:
        MisconfigurationException: a step returns no loss.
    """
    seen = 0
    with isolate_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for batch in batches(trainer.train_dataloader, samples):
            with dry_step(module):
                result = run_step(trainer, module, batch)
                loss = result.get("loss") if isinstance(result, Mapping) else result
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise MisconfigurationException(
                        f"`training_step` of {type(module).__name__} must return a loss that can be differentiated, "
                        f"got {result!r}"
                    )
                see(loss)
            seen += batch_size([Call((batch,))])
            if seen >= samples:
                break
