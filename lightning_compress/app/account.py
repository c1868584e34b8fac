"""Whether W&B can be reached, as far as one can tell without asking it."""

from __future__ import annotations

import os

__all__ = ["offline_mode"]


def offline_mode(offline: bool | None = None) -> bool:
    """Whether W&B is to write files only.

    Args:
        offline: None: so it is where there is no API key (in the environment or from `wandb login`), unless
            `WANDB_MODE` says otherwise.
    """
    if offline is not None:
        return offline
    import wandb

    mode = os.environ.get("WANDB_MODE")
    return mode in ("offline", "dryrun") or (not mode and not wandb.login(prompt=False, verify=False))
