"""`hydra/sweeper: grid`: every combination, but for those that make no sense."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import ConfigCompositionException

__all__ = ["GridSweeper"]


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, which leaves out jobs that set what their method does not have.

    In `method=glob(*) method.budget.macs=0.5,0.25` some methods have no budget. Hydra's sweeper would refuse the whole
    sweep; this one says what it leaves out, and why. An override that no job can have is a mistake and refused, like a
    name that does not exist.
    """

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """The next jobs that can be composed."""
        from lightning_compress.app.sweep import Sweep  # here: Hydra loads its plugins at every start

        assert self.hydra_context is not None
        assert self.config is not None
        possible, refused = [], []
        batch = super().get_job_batch()
        shared = set(batch[0]).intersection(*batch)
        for job in batch:
            try:
                self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
            except ConfigCompositionException as error:
                reason = str(error).partition("\n")[0]
                if not reason.startswith("Could not override"):
                    raise
                refused.append((job, reason, error))
            else:
                possible.append(job)
        if refused and not possible:
            raise refused[0][2]
        for job, reason, _ in refused:
            Sweep.leave_out([override for override in job if override not in shared], reason)
        return possible

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """That was seen in choosing it."""
