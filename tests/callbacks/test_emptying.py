"""Regularisers of channel pruning in a run: what they do to channels before the cut, and to nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Budget, ChannelPruning, WeightPruning
from lightning_compress.coupling import trace_coupling
from lightning_compress.edits import Keep
from lightning_compress.footprint import measure
from lightning_compress.methods.regularization import ChannelSlices, cut_of
from tests.contract.nets import Residual
from tests.contract.runs import EPOCHS, Task, fit, task

X = torch.zeros(2, 1, 8, 8)


class Steady(Task):
    """A rate that stays."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def steady() -> Task:
    torch.manual_seed(1)
    return Steady(Residual())


def pruning(**options: Any) -> ChannelPruning:
    return ChannelPruning(**{"budget": Budget(macs=0.5), "start": 1, "end": 3, "steps": 2, "samples": 32, **options})


class BeforeCuts(L.Callback):
    """The norms of the channels that are cut and of those that stay, just before each cut."""

    def __init__(self) -> None:
        self.cut: list[Tensor] = []
        self.kept: list[Tensor] = []

    def before_edits(self, trainer: L.Trainer, pl_module: Any, path: str) -> None:
        self.coupling = trace_coupling(pl_module.net, X)
        slices = ChannelSlices(self.coupling)
        self.norms, self.classes = slices.norms(dict(pl_module.net.named_parameters())), slices.classes

    def after_edits(self, trainer: L.Trainer, pl_module: Any, path: str, edits: Any, frozen: Any) -> None:
        assert isinstance(edits[0], Keep)
        gone = torch.from_numpy(cut_of(self.coupling, edits[0])[self.classes])
        self.cut.append(self.norms[gone])
        self.kept.append(self.norms[~gone])


def test_growing_empties_what_is_cut_and_nothing_else(tmp_path: Path) -> None:
    found = {}
    for regularization in (None, "growing"):
        watch = BeforeCuts()
        callback = pruning(regularization=regularization, start=20, end=20, steps=1, refit=False)
        fit(steady(), tmp_path / str(regularization), callback, watch, max_epochs=21)
        found[regularization] = watch
    cut, kept = found["growing"].cut[0], found["growing"].kept[0]
    assert cut.max() < 0.02 * kept.mean()
    assert kept.min() > 10 * cut.max()
    assert found[None].cut[0].min() > 0.2 * found[None].kept[0].mean()


def test_what_was_marked_is_cut_whatever_the_criterion_says_by_then(tmp_path: Path) -> None:
    """Nothing is more fickle than `random`."""

    class Marks(L.Callback):
        def __init__(self) -> None:
            self.marked: Any = None

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            [callback] = [c for c in trainer.callbacks if isinstance(c, ChannelPruning)]
            self.marked = callback.state_dict()["marked"] or self.marked

        def after_edits(self, trainer: L.Trainer, pl_module: Any, path: str, edits: Any, frozen: Any) -> None:
            assert self.marked is not None
            assert edits[0].to_json()["slices"] == self.marked["plan"][0]["slices"]
            assert edits[0].to_json()["indices"] == self.marked["plan"][0]["indices"]

    for criterion in ("random", "fpgm"):
        module = task("residual")
        fit(module, tmp_path / criterion, pruning(regularization="growing", criterion=criterion), Marks())
        assert 0.45 < measure(module.net, X).macs / measure(Residual(), X).macs <= 0.5


@pytest.mark.parametrize("regularization", ["group_norm", "group_lasso"])
def test_group_norms_shrink_small_channels(regularization: str, tmp_path: Path) -> None:
    ratios = {}
    for name in (None, regularization):
        watch, strength = BeforeCuts(), {None: None, "group_norm": 0.02, "group_lasso": 0.2}[name]
        callback = pruning(regularization=name, strength=strength, start=4, end=4, steps=1)
        fit(steady(), tmp_path / str(name), callback, watch)
        ratios[name] = float(watch.cut[0].mean() / watch.kept[0].mean())
    assert ratios[regularization] < 0.9 * ratios[None]


class Alternating(Task):
    """Two optimizers, of which each has its own step; their rates are zero."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(0.0 * nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head = list(self.net.head.parameters())
        body = [p for name, p in self.net.named_parameters() if not name.startswith("head")]
        return torch.optim.SGD(body, 0.0), torch.optim.SGD(head, 0.0)


@pytest.mark.parametrize("regularization", ["slimming", "group_lasso"])
def test_once_for_each_parameter_and_in_excluded_layers_not_at_all(regularization: str, tmp_path: Path) -> None:
    """Whatever the number of optimizers."""
    seen: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.current_epoch:
                return
            seen.append(trainer.global_step)
            if regularization == "slimming":
                for module in pl_module.net.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        assert torch.equal(module.weight.grad, 0.5 * module.weight.sign())
                return
            coupling = trace_coupling(pl_module.net, X)
            coupling.freeze([coupling.locations["b.0.0.weight", 0]], "is excluded")
            slices, parameters = ChannelSlices(coupling), dict(pl_module.net.named_parameters())
            found = {name: p.grad.clone() for name, p in parameters.items()}
            for p in parameters.values():
                p.grad.zero_()
            slices.pull(parameters, 1.0 / slices.norms(parameters), 0.5)
            assert all(torch.equal(p.grad, found[name]) for name, p in parameters.items())
            assert parameters["head.weight"].grad.any()
            assert not parameters["b.0.1.weight"].grad.any()

    options = {"criterion": "bn_scale"} if regularization == "slimming" else {"exclude": ["b.0.0"]}
    callback = pruning(regularization=regularization, strength=0.5, budget=Budget(macs=0.8), **options)
    fit(Alternating(), tmp_path, callback, Look())
    assert len(seen) == 4


def test_nothing_is_pulled_after_the_last_edit(tmp_path: Path) -> None:
    class Frozen(Task):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Look(L.Callback):
        def __init__(self) -> None:
            self.sums: list[float] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.clone() for p in pl_module.net.parameters()]
            for callback in trainer.callbacks:
                if isinstance(callback, ChannelPruning):
                    callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            pairs = zip(pl_module.net.parameters(), gradients, strict=True)
            self.sums.append(sum(float((p.grad - g).abs().sum()) for p, g in pairs))

    look = Look()
    torch.manual_seed(0)
    fit(Frozen(Residual()), tmp_path, look, pruning(regularization="group_norm"))
    assert np.count_nonzero(look.sums[:12]) == 12
    assert not any(look.sums[12:])
    assert len(look.sums) == 4 * EPOCHS


def test_another_methods_edit_in_between_marks_anew(tmp_path: Path) -> None:
    module = task("residual")
    first = pruning(budget=Budget(macs=0.8), start=1, end=1, steps=1)
    second = pruning(budget=Budget(params=0.5), start=3, end=3, steps=1, regularization="growing")
    weights = WeightPruning(0.3, start=2, end=2, steps=1)
    fit(module, tmp_path / "a", first, second, weights)
    assert measure(module.net, X).params <= 0.5 * measure(Residual(), X).params
    for epoch in (0, 1, 2):
        again = task("residual")
        callbacks = (
            pruning(budget=Budget(macs=0.8), start=1, end=1, steps=1),
            pruning(budget=Budget(params=0.5), start=3, end=3, steps=1, regularization="growing"),
            WeightPruning(0.3, start=2, end=2, steps=1),
        )
        fit(again, tmp_path / f"b{epoch}", *callbacks, ckpt=tmp_path / f"a/epoch={epoch}.ckpt")
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


def test_masks_that_come_at_the_same_time_forget_nothing(tmp_path: Path) -> None:
    module = task("residual")
    weights = WeightPruning(0.3, start=1, end=1, steps=1)
    fit(module, tmp_path, weights, pruning(criterion="taylor"))
    assert measure(module.net, X).macs <= 0.5 * measure(Residual(), X).macs


@pytest.mark.parametrize("regularization", ["group_norm", "growing"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 14},
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "limit_val_batches": 0},
    ],
)
def test_in_every_kind_of_run(options: dict[str, Any], regularization: str, tmp_path: Path) -> None:
    module = task("residual")
    life = {"start": 0.1, "end": 0.6} if "fast_dev_run" in options else {}
    fit(module, tmp_path, pruning(regularization=regularization, **life), **options)
    inputs = X.to(next(module.net.parameters()).dtype)
    assert 0.45 < measure(module.net, inputs).macs / measure(Residual(), X).macs <= 0.5


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_the_pull_grows_to_its_strength_half_way(unit: str, tmp_path: Path) -> None:
    class Still(Task):
        """Weights that do not move: what is added to gradients is the pull alone."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Look(L.Callback):
        def __init__(self) -> None:
            self.pulls: list[float] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.gradient = pl_module.net.b[0][0].weight.grad.clone()

    class After(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            weight = pl_module.net.b[0][0].weight
            ratio = (weight.grad - look.gradient).norm() / weight.norm()
            look.pulls.append(float(ratio.detach()))

    torch.manual_seed(0)
    look, length = Look(), {"max_epochs": -1, "max_steps": 20} if unit == "step" else {}
    callback = pruning(regularization="growing", start=4, end=4, steps=1, strength=0.5)
    fit(Still(Residual()), tmp_path, look, callback, After(), **length)
    found = np.array(look.pulls[:16]) / look.pulls[15]
    assert np.allclose(found, np.minimum(1.0, np.arange(16) / 8), atol=1e-3)
    assert not any(look.pulls[16:])
    assert len(look.pulls) == 20


@pytest.mark.parametrize("options", [{"sensitivity": 1.0}, {"sensitivity": 0.5, "ranking": "isomorphic"}])
def test_sensitivity_in_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path, pruning(**options))
    assert 0.45 < measure(module.net, X).macs / measure(Residual(), X).macs <= 0.5
