"""Lightning checkpoints of compressed networks, loaded with no Trainer and no callback."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

import lightning as L

from lightning_compress.edits import (
    EditError,
    apply_edits,
    edits_from_json,
    edits_to_json,
    history,
    rewind_edits,
    skeleton,
)
from lightning_compress.quiet import without_observers

__all__ = ["CHECKPOINT_KEY", "load_from_checkpoint", "record_edits", "replay_checkpoint"]

CHECKPOINT_KEY = "lightning_compress"
_Module = TypeVar("_Module", bound=L.LightningModule)
_PATCH = threading.RLock()  # a class is patched by one thread at a time


def record_edits(module: L.LightningModule, path: str, checkpoint: dict[str, Any]) -> None:
    """Put the history of a module's network into a checkpoint; several callbacks may do so for the same network.

    Args:
        module: the module that is being saved.
        path: dotted name of its compressed network; empty for the module itself.
        checkpoint: the checkpoint.
    """
    edits = history(module.get_submodule(path))
    if edits:
        checkpoint[CHECKPOINT_KEY] = {"network": path, "edits": edits_to_json(edits)}


def replay_checkpoint(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Bring a module to the structure that a checkpoint's weights have, forwards or back.

    Edits that the network has been through and the checkpoint has not are undone (shapes only: the weights are about to
    be loaded); those that are missing are applied. Optimizers made before do not follow.

    Args:
        module: the module that the weights will be loaded into.
        checkpoint: a loaded checkpoint; its entry `lightning_compress` holds `network`, the dotted name of the
            compressed network in the module, and `edits`, as JSON data.

    Raises:
        EditError: the entry is damaged, or its edits do not fit the module. Nothing was changed.
    """
    record = checkpoint.get(CHECKPOINT_KEY, {"network": None, "edits": []})
    if not isinstance(record, Mapping) or not {"network", "edits"} <= record.keys():
        raise EditError(f"the checkpoint's entry {CHECKPOINT_KEY!r} is damaged: expected `network` and `edits`")
    path, edits = record["network"], edits_from_json(record["edits"])
    if path is not None and path not in dict(module.named_modules()):
        raise EditError(
            f"the checkpoint is of a {type(module).__name__} whose compressed network is {path!r}, and this one has "
            "no such submodule"
        )
    for name, network in list(module.named_modules()):
        wanted, applied = (edits if name == path else ()), history(network)
        shared = 0
        while shared < min(len(wanted), len(applied)) and wanted[shared] == applied[shared]:
            shared += 1
        if shared == len(wanted) == len(applied):
            continue
        with without_observers(network):
            trial = skeleton(network)
        for structure in (trial, network):  # on the trial first: undoing an edit loses the weights
            rewind_edits(structure, shared)
            apply_edits(structure, wanted[shared:])


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, type | str) else f"a {type(value).__name__}"


def load_from_checkpoint(cls: type[_Module], path: str | Path | IO[bytes], **kwargs: Any) -> _Module:
    """`cls.load_from_checkpoint(path, **kwargs)` for checkpoints of compressed networks, and for all others.

    The edits in the checkpoint are replayed on the new module just before the weights are loaded; the class itself is
    not changed, and may be loaded in several threads.

    Args:
        cls: the LightningModule that was trained.
        path: the checkpoint.
        kwargs: as for `cls.load_from_checkpoint`.

    Returns:
        The module, with its network compressed.

    Raises:
        EditError: the edits in the checkpoint do not fit the module.
        TypeError: `cls` is no LightningModule's class, or makes another; the file is no checkpoint of a Trainer.

    Example:
        >>> import tempfile
        >>> from lightning_compress import Budget, ChannelPruning
        >>> from lightning_compress.zoo import Digits, ImageClassifier, LeNet300100
        >>> off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> quiet = dict.fromkeys(off, False)
        >>> pruning = ChannelPruning(Budget(macs=0.5), end=0, steps=1)
        >>> trainer = L.Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, callbacks=[pruning], **quiet)
        >>> trainer.fit(ImageClassifier(LeNet300100(image_size=8), 10), Digits())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(Path(folder, "a.ckpt"))
        ...     net = LeNet300100(image_size=8)
        ...     task = load_from_checkpoint(ImageClassifier, Path(folder, "a.ckpt"), net=net, num_classes=10)
        >>> len(task.net[1].weight) < 300
        True
    """
    if not (isinstance(cls, type) and issubclass(cls, L.LightningModule)):
        raise TypeError(f"`cls` must be the class of the LightningModule that was trained, got {_kind(cls)}")
    thread = threading.get_ident()
    replayed = False
    with _PATCH:
        original = cls.on_load_checkpoint
        own = cls.__dict__.get("on_load_checkpoint")

        @wraps(original)
        def on_load_checkpoint(self: _Module, checkpoint: dict[str, Any]) -> None:
            nonlocal replayed
            if threading.get_ident() == thread:  # another thread may be loading the class in its own way
                replay_checkpoint(self, checkpoint)
                replayed = True
            original(self, checkpoint)

        cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign, assignment]
        try:
            module = cls.load_from_checkpoint(path, **kwargs)
        except KeyError as error:
            if error.args != ("pytorch-lightning_version",):
                raise
            raise TypeError(
                f"{path} is no checkpoint of a Trainer, as ModelCheckpoint and trainer.save_checkpoint write them; "
                "a bare state dict is loaded by load_state_dict, an artifact by load_compressed"
            ) from error
        finally:
            if own is None:
                del cls.on_load_checkpoint
            else:
                cls.on_load_checkpoint = own  # type: ignore[method-assign]
    if not replayed:
        raise TypeError(
            f"the checkpoint made a {type(module).__name__} whose on_load_checkpoint does not call that of "
            f"{cls.__name__}, so its edits could not be replayed; pass that class itself"
        )
    return module
