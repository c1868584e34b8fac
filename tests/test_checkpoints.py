"""Checkpoints of compressed networks load with no Trainer and no callback."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress.checkpoints import load_from_checkpoint, record_edits, replay_checkpoint
from lightning_compress.edits import EditError, Keep, apply_edits, history


class Plain(L.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


class Hooked(Plain):
    """Has a hook of its own, which must still be called, after the edits."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heard = (checkpoint["note"], tuple(self.net[0].weight.shape))


def cut(kept: tuple[int, ...], width: int = 4) -> Keep:
    return Keep(
        {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}},
        {"0.weight": (width, 3), "0.bias": (width,), "1.weight": (2, width)},
        {"0": {"out_features": (width, len(kept))}, "1": {"in_features": (width, len(kept))}},
    )


EDITS = (cut((0, 1, 3)), cut((0, 2), 3))


def saved(path: Path, kind: type[Plain], *edits: Keep) -> Plain:
    module = kind()
    apply_edits(module.net, edits)
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": L.__version__,
        "note": "kept",
    }
    record_edits(module, "net", checkpoint)
    torch.save(checkpoint, path)
    return module


@pytest.mark.parametrize("edits", [(), EDITS[:1], EDITS], ids=["dense", "once", "twice"])
@pytest.mark.parametrize("kind", [Plain, Hooked])
def test_loads(tmp_path: Path, kind: type[Plain], edits: tuple[Keep, ...]) -> None:
    module = saved(tmp_path / "a.ckpt", kind, *edits)
    before = kind.__dict__.get("on_load_checkpoint")
    loaded = load_from_checkpoint(kind, tmp_path / "a.ckpt", weights_only=True)
    assert type(loaded) is kind
    assert history(loaded.net) == edits
    x = torch.randn(5, 3)
    assert torch.equal(loaded.net(x), module.net(x))
    assert kind.__dict__.get("on_load_checkpoint") is before
    if isinstance(loaded, Hooked):
        assert loaded.heard == ("kept", tuple(module.net[0].weight.shape))


def test_an_error_restores_the_class(tmp_path: Path) -> None:
    saved(tmp_path / "a.ckpt", Plain, *EDITS)
    with pytest.raises(EditError, match=r"0.weight.*expected shape \[4, 3\], got \[5, 3\]"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt", width=5)
    assert "on_load_checkpoint" not in Plain.__dict__


def test_a_subclass_that_keeps_the_hook_to_itself_is_told(tmp_path: Path) -> None:
    class Other(Plain):
        pass

    saved(tmp_path / "a.ckpt", Plain)

    def stubborn(*_: Any, **__: Any) -> Hooked:
        return Hooked()

    Other.load_from_checkpoint = stubborn
    with pytest.raises(TypeError, match="Hooked whose on_load_checkpoint does not call that of Other"):
        load_from_checkpoint(Other, tmp_path / "a.ckpt")


def test_several_threads(tmp_path: Path) -> None:
    for name, edits in (("dense", ()), ("once", EDITS[:1]), ("twice", EDITS)):
        saved(tmp_path / name, Hooked, *edits)
    widths = {"dense": 4, "once": 3, "twice": 2}
    found: list[tuple[str, int]] = []

    def load(name: str) -> None:
        found.append((name, load_from_checkpoint(Hooked, tmp_path / name).net[0].out_features))

    threads = [threading.Thread(target=load, args=(name,)) for name in list(widths) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(width == widths[name] for name, width in found)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (3, "damaged"),
        ({"network": "net"}, "damaged"),
        ({"network": "backbone", "edits": []}, "'backbone'.*no such submodule"),
        ({"network": "net", "edits": [{"kind": "teleport"}]}, "unknown kind"),
    ],
)
def test_damaged_records_change_nothing(record: Any, match: str) -> None:
    module = Plain()
    with pytest.raises(EditError, match=match):
        replay_checkpoint(module, {"lightning_compress": record})
    assert history(module.net) == ()
    assert module.net[0].weight.shape == (4, 3)


def test_replay_goes_forwards_and_back() -> None:
    module = Plain()
    checkpoints: list[dict[str, Any]] = [{}, {}, {}]
    for count in range(3):
        source = Plain()
        apply_edits(source.net, EDITS[:count])
        record_edits(source, "net", checkpoints[count])
    for count in (1, 2, 0, 2, 1):
        replay_checkpoint(module, checkpoints[count])
        assert history(module.net) == EDITS[:count]
        assert module.net[0].out_features == module.net[0].weight.shape[0] == (4, 3, 2)[count]
