"""A dry step finds out how the network is called, and leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.capture import Captured, capture
from tests.contract.nets import Residual
from tests.contract.runs import Task, data, task, trainer


class Probe(L.Callback):
    """Captures at the start of training and compares what was with what is."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.captured: Captured | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self.snapshot(pl_module)
        self.captured = capture(trainer, pl_module, **self.options)
        for name, value in self.snapshot(pl_module).items():
            assert equal(before[name], value), f"{name} changed"
        assert not {"log", "log_dict", "manual_backward", "optimizers"} & vars(pl_module).keys()

    def snapshot(self, module: L.LightningModule) -> dict[str, Any]:
        metrics = [
            copy.deepcopy(vars(m))
            for m in module.modules()
            if isinstance(m, torch.nn.Module) and hasattr(m, "_defaults")
        ]
        return {
            "rng": torch.get_rng_state(),
            "state": {k: v.clone() for k, v in module.state_dict().items()},
            "grads": [p.grad for p in module.parameters()],
            "trainable": [p.requires_grad for p in module.parameters()],
            "modes": [m.training for m in module.modules()],
            "metrics": [{k: m[k] for k in (*m["_defaults"], "_update_count")} for m in metrics],
            "seen": list(getattr(module, "seen", [])),
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def run(module: L.LightningModule, folder: Path, loader: Any = None, **options: Any) -> Captured:
    probe = Probe(**options)
    trainer(folder, probe, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(
        module, data() if loader is None else loader
    )
    assert probe.captured is not None
    return probe.captured


class Messy(Task):
    """A step with all that a step may do on the side."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.seen: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(batch_idx)
        x = x + 0.1 * torch.randn_like(x)
        self.accuracy.update(self.net(x), y)
        return super().training_step([x, y], batch_idx)


def test_no_trace(tmp_path: Path) -> None:
    module = Messy()
    captured = run(module, tmp_path, samples=40)
    assert captured.path == "net"
    assert captured.network is module.net
    assert len(captured.calls) == 2  # the step calls it twice
    assert sum(len(call.args[0]) for call in captured.calibration) >= 40 * 2
    assert module.seen == [0]


def test_samples_are_the_same_every_time(tmp_path: Path) -> None:
    shuffled = DataLoader(data().dataset, batch_size=16, shuffle=True)
    first, second = (run(task("plain"), tmp_path, shuffled).calls[0].args[0] for _ in range(2))
    assert torch.equal(first, second)


class Manual(Task):
    """Two steps of its own in each step."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x), y)
        (loss.backward if batch_idx % 2 else lambda: self.manual_backward(loss))()
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def test_manual_optimisation_stops_before_anything_changes(tmp_path: Path) -> None:
    assert len(run(Manual(), tmp_path).calls) == 1


class Two(L.LightningModule):
    """An encoder and a decoder, and a parameter used outside of both."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Sequential(nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 64)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        h = self.down(x)
        extra = nn.functional.linear(h, self.down[0].weight.t()).square().mean()
        return nn.functional.mse_loss(self.up(h), x) + 0.01 * extra

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_several_parts_make_the_whole_module_the_network(tmp_path: Path) -> None:
    captured = run(Two(), tmp_path)
    assert captured.path == ""
    assert [call.path for call in captured.calls] == ["down", "up"]
    assert captured.outside == ("down.0.weight",)


def test_a_named_part(tmp_path: Path) -> None:
    captured = run(Two(), tmp_path, network="up")
    assert (captured.path, captured.calls[0].args[0].shape[1]) == ("up", 16)


def test_a_network_inside_a_compile_wrapper(tmp_path: Path) -> None:
    module = task("plain")
    module.net = torch.compile(module.net)
    captured = run_without_training(module, tmp_path)
    assert captured.path == "net._orig_mod"
    assert len(captured.calls) == 1


def run_without_training(module: L.LightningModule, folder: Path) -> Captured:
    probe = Probe()

    class Stop(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

        def on_train_batch_start(self, *_: Any) -> int:
            return -1

    trainer(folder, probe, Stop(), max_epochs=1, limit_val_batches=0).fit(module, data())
    assert probe.captured is not None
    return probe.captured


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((torch.randn(1, 8, 8), i % 4) for i in range(32))


def test_a_stream_of_samples(tmp_path: Path) -> None:
    assert len(run(task("plain"), tmp_path, DataLoader(Stream(), batch_size=8)).calls) == 1


class Idle(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net.head.weight.square().sum()


def test_a_network_that_is_never_called(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"net is never called in `training_step`"):
        run(Idle(Residual()), tmp_path)


def test_an_unknown_name_lists_the_parts(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no submodule 'nett'; it has net, accuracy"):
        run(task("plain"), tmp_path, network="nett")
