"""The dense network as a teacher: kept in memory, and in a file beside the checkpoints for runs that are resumed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.artifact import load_compressed, save_compressed
from lightning_compress.callbacks.evaluation import from_rank_zero
from lightning_compress.distill.cache import weights_digest
from lightning_compress.edits import rewind_edits, skeleton
from lightning_compress.quiet import without_observers

__all__ = ["Snapshot"]


class Snapshot:
    """A copy of a network. Checkpoints hold its file's name, never its weights.

    Args:
        network: what is copied, or was.
        name: of its file.
        folders: where it may be found.
    """

    def __init__(self, network: nn.Module, name: str, folders: Iterable[str] = ()) -> None:
        self.network, self.name = network, name
        self.folders = list(folders)

    @classmethod
    def take(cls, network: nn.Module, trainer: pl.Trainer) -> Snapshot:
        """Copy a network as it is now, on every rank as on the first; its file will be beside the run's checkpoints."""
        copy = _copy(network)
        from_rank_zero(trainer, copy)
        return cls(copy, f"teacher-{weights_digest(copy)}.safetensors", [str(_folder(trainer))])

    @classmethod
    def find(cls, state: dict[str, Any], network: nn.Module, trainer: pl.Trainer) -> Snapshot:
        """The snapshot that a checkpoint speaks of.

        Args:
            state: what `state` gave.
            network: the network now, with the edits of the checkpoint.
            trainer: with the checkpoint that is being resumed.

        Raises:
            MisconfigurationException: its file is gone.
        """
        beside = [str(Path(str(trainer.ckpt_path)).parent)] if trainer.ckpt_path else []
        folders = [*beside, *state["folders"]]
        for folder in folders:
            path = Path(folder, state["name"])
            if path.is_file():
                dense = _copy(network)
                rewind_edits(dense)
                return cls(load_compressed(path, dense), state["name"], [str(_folder(trainer)), *folders])
        raise MisconfigurationException(
            f"teacher='self': the dense network of this run, {state['name']}, is not beside the checkpoint, nor in "
            f"{', '.join(state['folders'])}. It is written there with the first checkpoint after an edit: put it back, "
            "or resume without Distillation"
        )

    def save(self, trainer: pl.Trainer) -> None:
        """Write it beside this run's checkpoints, once."""
        folder = _folder(trainer)
        path = folder / self.name
        if trainer.is_global_zero and not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_compressed(self.network, path)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"name": self.name, "folders": list(self.folders)}


def _folder(trainer: pl.Trainer) -> Path:
    saving = trainer.checkpoint_callback
    return Path(str(getattr(saving, "dirpath", None) or trainer.default_root_dir)).absolute()


def _copy(network: nn.Module) -> nn.Module:
    with without_observers(network):
        return skeleton(network, lambda tensor: tensor.detach().clone())
