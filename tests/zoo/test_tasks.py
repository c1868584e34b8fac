"""The classification task: it learns, repeats itself, follows its schedule, and runs as people run it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.zoo import Digits, ImageClassifier, LeNet300100, VGGSmall
from lightning_compress.zoo.optimization import learning_rate_factor


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**settings | arguments)


def perceptron(**arguments: Any) -> ImageClassifier:
    return ImageClassifier(LeNet300100(image_size=8), 10, **arguments)


def trained(folder: Path, seed: int = 0, epochs: int = 2, **arguments: Any) -> tuple[ImageClassifier, L.Trainer]:
    L.seed_everything(seed, verbose=False)
    task, fit = perceptron(), trainer(folder, max_epochs=epochs, **arguments)
    fit.fit(task, Digits(batch_size=32, limit_train=1000, augment=True))
    return task, fit


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_two_epochs_on_digits_teach_something_and_every_metric_is_logged(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    task, fit = perceptron(), trainer(tmp_path, max_epochs=2)
    data = Digits(batch_size=32)
    fit.fit(task, data)
    assert set(fit.callback_metrics) == {"train/loss", "val/loss", "val/acc"}
    assert fit.callback_metrics["val/acc"] > 0.8

    [metrics] = fit.test(task, data, verbose=False)
    assert set(metrics) == {"test/loss", "test/acc"}
    assert metrics["test/acc"] > 0.8
    with torch.no_grad():
        right = [(task(images).argmax(1) == labels).float() for images, labels in data.test_dataloader()]
    assert metrics["test/acc"] == pytest.approx(torch.cat(right).mean().item())


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    (one, _), (two, _), (other, _) = (trained(tmp_path, seed=seed, epochs=1) for seed in (3, 3, 4))
    assert same(one, two)
    assert not same(one, other)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, _ = trained(tmp_path, epochs=3, enable_checkpointing=True, callbacks=[checkpoint])
    torch.randn(100)  # whoever resumes has drawn other random numbers
    resumed = perceptron()
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(resumed, Digits(batch_size=32, limit_train=1000, augment=True), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(whole, resumed)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_every_optimizer_follows_every_schedule_to_the_end_of_the_run(
    tmp_path: Path, optimizer: str, schedule: str
) -> None:
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = perceptron(lr=0.001, optimizer=optimizer, schedule=schedule, warmup=0.25)
    before = copy.deepcopy(task)
    trainer(tmp_path, max_epochs=2, limit_train_batches=4, limit_val_batches=1, callbacks=[Watch()]).fit(task, Digits())
    factors = [learning_rate_factor(step, 8, schedule, 0.25) for step in range(8)]  # type: ignore[arg-type]
    assert rates == pytest.approx([0.001 * factor for factor in factors])
    assert not same(task, before)


def test_learning_rates_rise_then_fall_and_stay_in_range() -> None:
    for schedule, last in (("cosine", 0.0), ("step", 0.01), ("constant", 1.0)):
        factors = [learning_rate_factor(step, 100, schedule, 0.1) for step in range(101)]  # type: ignore[arg-type]
        assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert all(0 <= factor <= 1 for factor in factors)
        assert factors[-1] == pytest.approx(last)


def test_label_smoothing_is_for_training_only(tmp_path: Path) -> None:
    # a network that is certain and right: no loss but that of the smoothing
    labels = torch.arange(10)
    loader = DataLoader(TensorDataset(100 * torch.eye(10), labels), batch_size=10)
    task = ImageClassifier(nn.Linear(10, 10, bias=False), 10, lr=1e-9, label_smoothing=0.1)
    nn.init.eye_(task.net.weight)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(task, loader, loader)
    assert fit.callback_metrics["train/loss"] == pytest.approx(0.1 * 100 * 9 / 10, rel=1e-3)
    assert fit.callback_metrics["val/loss"] == pytest.approx(0.0, abs=1e-5)
    assert fit.callback_metrics["val/acc"] == 1.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_networks_and_mixed_precision(tmp_path: Path, precision: Any) -> None:
    net = torch.compile(VGGSmall(in_channels=1, width=0.25), backend="eager")
    task = ImageClassifier(net, 10)  # type: ignore[arg-type]
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=4, limit_val_batches=1, precision=precision)
    fit.fit(task, Digits())
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    assert all(parameter.dtype == torch.float32 for parameter in task.parameters())


def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    class Compare(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            own = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
            both = pl_module.all_gather(own)
            assert trainer.world_size == 2
            assert torch.equal(both[0], both[1])
            metrics = pl_module.all_gather(dict(trainer.callback_metrics))
            assert set(metrics) == {"train/loss", "val/loss", "val/acc"}
            assert all(one == other for one, other in metrics.values())

    L.seed_everything(0, verbose=False)
    task = perceptron()
    fit = trainer(tmp_path, max_epochs=1, strategy="ddp_fork", devices=2, callbacks=[Compare()])
    fit.fit(task, Digits(batch_size=32, augment=True))
    assert fit.callback_metrics["val/acc"] > 0.6


def test_checkpoints_hold_the_arguments_but_not_the_network(tmp_path: Path) -> None:
    task, fit = trained(tmp_path, epochs=1)
    fit.save_checkpoint(tmp_path / "task.ckpt")
    assert "net" not in task.hparams
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "task.ckpt", net=LeNet300100(image_size=8))
    assert same(task, loaded)
    assert loaded.hparams == task.hparams


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lion"}, "`optimizer` must be one of sgd, adam, adamw, rmsprop, got 'lion'"),
        ({"schedule": "none"}, "`schedule` must be one of cosine, step, constant, got 'none'"),
        ({"lr": 0.0}, "`lr` must be above 0, got 0.0"),
        ({"lr": float("nan")}, "`lr` must be above 0, got nan"),
        ({"momentum": 1.0}, "`momentum` must be in .0, 1., got 1.0"),
        ({"weight_decay": -1e-4}, "`weight_decay` must be 0 or above, got -0.0001"),
        ({"warmup": 5}, "`warmup` must be .* a fraction of the run, got 5"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be .* got 1.5"),
    ],
)
def test_misuse_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perceptron(**arguments)


def test_a_run_without_end_needs_a_constant_rate(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    with pytest.raises(ValueError, match="give the Trainer `max_epochs` or `max_steps`"):
        trainer(tmp_path, max_epochs=-1).fit(perceptron(), Digits())
    fit = trainer(tmp_path, max_epochs=-1, limit_train_batches=3, callbacks=[Stop()])
    fit.fit(perceptron(schedule="constant", warmup=0), Digits())
    assert fit.global_step == 6
