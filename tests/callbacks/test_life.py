"""The life of a compression callback beside everything else that a run may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.budget import Budget
from lightning_compress.callbacks.pruning import ChannelPruning
from lightning_compress.callbacks.surroundings import check_surroundings
from lightning_compress.callbacks.timing import milestones
from lightning_compress.checkpoints import load_from_checkpoint, replay_checkpoint
from lightning_compress.edits import EditError, history
from lightning_compress.footprint import measure
from lightning_compress.schedule import SCHEDULES
from tests.contract.nets import NETS, Residual
from tests.contract.runs import Metrics, Task, data, fit, task, trainer

X = torch.zeros(2, 1, 8, 8)


def pruning(**options: Any) -> ChannelPruning:
    return ChannelPruning(**{"budget": Budget(macs=0.5), "start": 1, "end": 3, "steps": 2, "samples": 32, **options})


def share(module: Task, net: str = "residual") -> float:
    inputs = X.to(next(module.net.parameters()).dtype)
    return measure(module.net, inputs).macs / measure(NETS[net](), X).macs


class When(L.Callback):
    """Where the edits fell."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int]] = []

    def after_edits(self, trainer: L.Trainer, *_: Any) -> None:
        self.at.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 5}, [(1, 4), (3, 12)]),
        ({"max_epochs": 5, "accumulate_grad_batches": 2}, [(1, 2), (3, 6)]),
        ({"max_epochs": 5, "limit_train_batches": 2, "limit_val_batches": 1}, [(1, 2), (3, 6)]),
        ({"max_epochs": 5, "limit_val_batches": 0, "num_sanity_val_steps": 0}, [(1, 4), (3, 12)]),
        ({"max_epochs": -1, "max_steps": 14}, [(1, 4), (3, 12)]),
        ({"max_epochs": 5, "precision": "bf16-mixed"}, [(1, 4), (3, 12)]),
        ({"max_epochs": 5, "precision": "bf16-true"}, [(1, 4), (3, 12)]),
        ({"max_epochs": 5, "gradient_clip_val": 0.1}, [(1, 4), (3, 12)]),
    ],
)
def test_edits_fall_where_they_should(options: dict[str, Any], expected: list[tuple[int, int]], tmp_path: Path) -> None:
    when, module = When(), task("residual")
    fit(module, tmp_path, pruning(), when, **options)
    assert when.at == expected
    assert 0.45 < share(module) <= 0.5


def test_fast_dev_run_makes_all_edits_at_once(tmp_path: Path) -> None:
    when, module = When(), task("residual")
    fit(module, tmp_path, pruning(start=0.1, end=0.6, steps=5), when, fast_dev_run=True)
    assert when.at == [(0, 0)]
    assert share(module) <= 0.5


def test_edits_never_fall_inside_an_accumulation(tmp_path: Path) -> None:
    batches: list[int] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.index = batch_idx

        def after_edits(self, *_: Any) -> None:
            batches.append(self.index)

    note = Note()
    running = trainer(
        tmp_path, note, pruning(start=0.4, end=0.8, steps=3), max_epochs=-1, max_steps=5, accumulate_grad_batches=3
    )
    running.fit(task("residual"), data(batch=8))
    assert len(batches) == 3
    assert all(index % 3 == 0 for index in batches)


@pytest.mark.parametrize(
    ("start", "end", "steps", "schedule", "expected"),
    [
        (0.0, 0.5, 5, "cubic", [(0, 0.488), (1, 0.784), (2, 0.936), (3, 0.992), (5, 1.0)]),
        (2, 4, 3, "linear", [(2, 1 / 3), (3, 2 / 3), (4, 1.0)]),
        (0.0, 1.0, 2, "linear", [(0, 0.5), (9, 1.0)]),
        (0.3, 0.3, 4, "linear", [(3, 1.0)]),
        (0.2, 0.8, 1, "linear", [(8, 1.0)]),
        (0.2, 0.8, 3, "one_shot", [(2, 1.0), (5, 1.0), (8, 1.0)]),
    ],
)
def test_milestones(start: Any, end: Any, steps: int, schedule: str, expected: list[tuple[int, float]]) -> None:
    found = milestones(L.Trainer(max_epochs=10, logger=False), start, end, steps, SCHEDULES[schedule])
    assert [(m.at, pytest.approx(m.amount, abs=1e-9)) for m in found] == expected


def test_a_window_outside_of_the_run_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="training ends at epoch 5"):
        fit(task("residual"), tmp_path, pruning(start=3, end=9))
    with pytest.raises(MisconfigurationException, match="needs to know when training ends"):
        fit(task("residual"), tmp_path, pruning(), max_epochs=-1)


def test_ending_early_is_said(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch >= 1

    with pytest.warns(UserWarning, match=r"training ended before ChannelPruning's last edit: .* 88% of the way"):
        fit(task("residual"), tmp_path, pruning(), Stop())


def test_best_is_the_best_compressed_network(tmp_path: Path) -> None:
    """A score from before an edit belongs to another network, and a file's name must tell the truth."""
    saving = ModelCheckpoint(tmp_path / "best", "{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=1)
    stopping = EarlyStopping("val_loss", patience=3)
    module = task("residual")
    running = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[pruning(), saving, stopping],
    )
    running.fit(module, data(), data())
    best = torch.load(saving.best_model_path, weights_only=True)
    assert best["epoch"] >= 3
    assert len(best["lightning_compress"]["edits"]) == len(history(module.net))
    for path in (tmp_path / "best").glob("*.ckpt"):
        (scores,) = running.validate(module, data(), ckpt_path=path, verbose=False, weights_only=True)
        assert scores["val_loss"] == pytest.approx(float(path.stem.split("val_loss=")[1]), abs=2e-6)


@pytest.mark.parametrize("resume", [None, 0, 1, 3])
def test_averaged_weights_follow(resume: int | None, tmp_path: Path) -> None:
    """EMA starts anew from each edited network; a resumed run ends like the uninterrupted one."""
    module = task("residual")
    fit(module, tmp_path / "a", pruning(), EMAWeightAveraging(decay=0.9))
    assert share(module) <= 0.5
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if resume is not None:
        again = task("residual")
        fit(again, tmp_path / "b", pruning(), EMAWeightAveraging(decay=0.9), ckpt=tmp_path / f"a/epoch={resume}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


class Manual(Task):
    def __init__(self) -> None:
        super().__init__(Residual())
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Manual()
    fit(module, tmp_path, pruning())
    assert 0.45 < share(module) <= 0.5


def test_a_compiled_network_is_pruned_inside_and_compiled_again(tmp_path: Path) -> None:
    module, plain = task("residual"), task("residual")
    module.net = torch.compile(module.net, backend="aot_eager")
    fit(module, tmp_path / "compiled", pruning())
    fit(plain, tmp_path / "plain", pruning())
    assert history(module.net._orig_mod) == history(plain.net)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert measure(module.net._orig_mod, X).macs == measure(plain.net, X).macs


class Alternating(Task):
    """Two optimizers; the second holds the head only."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        body, head = self.optimizers()
        self.manual_backward(loss)
        for optimizer in (body, head):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        head = list(self.net.head.parameters())
        body = [p for name, p in self.net.named_parameters() if not name.startswith("head")]
        return torch.optim.Adam(body, 0.01), torch.optim.SGD(head, 0.01, momentum=0.9)


def test_several_optimizers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Alternating()
    running = fit(module, tmp_path, pruning())
    momentum = running.optimizers[1].state[module.net.head.weight]["momentum_buffer"]
    assert momentum.shape == module.net.head.weight.shape


def test_frozen_layers_stay_frozen(tmp_path: Path) -> None:
    module = task("residual")
    module.net.stem.requires_grad_(False)
    fit(module, tmp_path, pruning())
    assert not any(p.requires_grad for p in module.net.stem.parameters())
    assert module.net.stem[0].weight.shape[0] < 16


class Outside(Task):
    """A penalty on one layer's weight, written in the step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = nn.functional.linear(torch.ones(1, 16), self.net.a[0][0].weight.sum((2, 3))).square().mean()
        return super().training_step(batch, batch_idx) + 1e-4 * penalty


def test_what_the_step_uses_by_hand_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Outside(Residual())
    fit(module, tmp_path, pruning(budget=Budget(macs=0.7)))
    assert module.net.a[0][0].weight.shape[:2] == (16, 16)


def test_two_prunings_in_one_run(tmp_path: Path) -> None:
    module = task("residual")
    first = pruning(budget=Budget(macs=0.7), start=0, end=0, steps=1)
    second = pruning(budget=Budget(params=0.4), start=2, end=2, steps=1)
    fit(module, tmp_path / "a", first, second)
    assert measure(module.net, X).params <= 0.4 * measure(Residual(), X).params
    again = task("residual")
    first, second = (pruning(budget=c.budget, start=c.start, end=c.end, steps=1) for c in (first, second))
    fit(again, tmp_path / "b", first, second, ckpt=tmp_path / "a/epoch=0.ckpt")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())


def test_a_resumed_run_may_ask_for_another_budget(tmp_path: Path) -> None:
    """Fractions go on being of the dense network, not of what the first run left."""
    fit(task("residual"), tmp_path / "a", pruning(budget=Budget(macs=0.7)))
    module = task("residual")
    fit(module, tmp_path / "b", pruning(budget=Budget(macs=0.5)), ckpt=tmp_path / "a/epoch=3.ckpt")
    assert 0.45 < share(module) <= 0.5


def test_learning_rates_are_untouched(tmp_path: Path) -> None:
    rates = {}
    for name, callbacks in {"with": [pruning()], "without": []}.items():
        metrics = Metrics()
        fit(task("residual"), tmp_path / name, metrics, *callbacks)
        rates[name] = [row["lr"] for row in metrics.rows.values()]
    assert rates["with"] == rates["without"]


def test_training_before_the_first_edit_is_the_same_as_without(tmp_path: Path) -> None:
    shuffled = torch.utils.data.DataLoader(data().dataset, batch_size=16, shuffle=True)
    states = []
    for name, callbacks in {"with": [pruning(start=4, end=4, steps=1)], "without": []}.items():
        L.seed_everything(3)
        running = trainer(tmp_path / name, *callbacks)
        running.fit(task("residual"), shuffled, data())
        states.append(torch.load(tmp_path / name / "epoch=3.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_strategies_that_shard_are_refused() -> None:
    sharded = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(MisconfigurationException, match="does not work with FSDPStrategy"):
        check_surroundings(sharded)  # type: ignore[arg-type]


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="use WeightAveraging or EMAWeightAveraging"):
        fit(task("residual"), tmp_path, pruning(), StochasticWeightAveraging(0.01))


def test_the_module_can_be_pickled_afterwards(tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path, pruning())
    assert "on_load_checkpoint" not in vars(module)
    again = pickle.loads(pickle.dumps(module))
    assert history(again.net) == history(module.net)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


def test_edits_that_do_not_fit_cost_no_weights(tmp_path: Path) -> None:
    """Not even where edits of the module's own would have to be undone first."""
    fit(task("plain"), tmp_path / "a", pruning())
    checkpoint = torch.load(tmp_path / "a/epoch=4.ckpt", weights_only=True)
    module = task("residual")
    fit(module, tmp_path / "b", pruning())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(EditError, match="no such tensor"):
        replay_checkpoint(module, checkpoint)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_a_checkpoint_whose_edits_do_not_fit(tmp_path: Path) -> None:
    fit(task("residual"), tmp_path / "a", pruning())
    with pytest.raises(EditError, match="no such tensor; is it another architecture"):
        fit(task("plain"), tmp_path / "b", pruning(), ckpt=tmp_path / "a/epoch=4.ckpt")


def test_weights_that_are_not_finite_stop_the_run_before_training(tmp_path: Path) -> None:
    module = task("residual")
    module.net.a[0][0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"scores of 'a\.0\.0\.weight' are not finite"):
        fit(module, tmp_path, pruning())


def test_load_from_checkpoint_needs_no_callback(tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path, pruning())
    loaded = load_from_checkpoint(Task, tmp_path / "epoch=4.ckpt", net=Residual(), weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert history(loaded.net) == history(module.net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"must be a Budget, e.g. Budget\(macs=0.5\), got 0.5"),
        ({"start": 1.5}, "for epoch 1.5 write an integer|fraction of training"),
        ({"start": -1}, "got -1"),
        ({"start": 0.6, "end": 0.2}, "`start` must not be after `end`"),
        ({"steps": 0}, "`steps` must be an integer of at least 1"),
        ({"schedule": "cosine"}, "one_shot, linear, cubic, got 'cosine'"),
        ({"criterion": "taylor", "start": 0}, "`start` must be after 0"),
        ({"regularization": "slimming"}, "'slimming' goes with criterion='bn_scale', got 'l2'"),
        ({"regularization": "l0"}, "one of slimming, group_lasso, group_norm, growing, got 'l0'"),
        ({"strength": 0.1}, "`strength`=0.1 goes with `regularization`, which is None"),
        ({"regularization": "group_norm", "strength": -1.0}, "`strength` must be above 0, got -1.0"),
        ({"regularization": "growing", "start": 0.0, "end": 0.5}, "needs time before the first edit: `start`"),
        ({"regularization": "growing", "criterion": "taylor"}, "before criterion='taylor' has gradients"),
        ({"regularization": "group_lasso", "start": 0, "end": 0}, "before the last edit: `end` must be after 0"),
        ({"sensitivity": -1.0}, "`sensitivity` must be a power of at least 0, got -1.0"),
        ({"sensitivity": 1.0, "ranking": "layer"}, "weighs layers against each other"),
        ({"samples": 0}, "`samples`"),
        ({"exclude": "head"}, "list of patterns"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**options)
