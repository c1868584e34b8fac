"""The report: its figures are those of the saved file, and training goes on as if it were not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress
from lightning_compress import container
from lightning_compress.artifact import load_compressed
from lightning_compress.budget import Budget
from lightning_compress.callbacks.quantization import Quantization
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.callbacks.surroundings import follow, replay_on_load
from lightning_compress.checkpoints import record_edits
from lightning_compress.edits import Keep, apply_edits, history
from lightning_compress.exporting import ExportError
from lightning_compress.results import Results

WIDTH = 8


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, 4),
    )


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.accuracy(scores, y)
        self.log("val/acc", self.accuracy)
        self.log("val/loss", nn.functional.cross_entropy(scores, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02)


def halve(prefix: str = "") -> Keep:
    kept = tuple(range(0, WIDTH, 2))
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (WIDTH,)) | {"0.weight": (WIDTH, 1, 3, 3)}
    return Keep(
        {prefix + name: {0: kept} for name in names} | {f"{prefix}3.weight": {1: kept}},
        {prefix + name: size for name, size in sizes.items()} | {f"{prefix}3.weight": (6, WIDTH, 3, 3)},
        {
            f"{prefix}0": {"out_channels": (WIDTH, 4)},
            f"{prefix}1": {"num_features": (WIDTH, 4)},
            f"{prefix}3": {"in_channels": (WIDTH, 4)},
        },
        "halve",
    )


class Halve(L.Callback):
    """The least that a compression callback does."""

    def __init__(self, epoch: int = 1, path: str = "net", prefix: str = "") -> None:
        self.epoch, self.network_path, self.prefix = epoch, path, prefix
        self.budget = Budget(macs=0.6, params=400)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        replay_on_load(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        record_edits(pl_module, self.network_path, checkpoint)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = pl_module.get_submodule(self.network_path)
        if trainer.current_epoch != self.epoch or history(network):
            return
        listeners = [callback for callback in trainer.callbacks if isinstance(callback, CompressionReport)]
        for listener in listeners:
            listener.before_edits(trainer, pl_module, self.network_path)
        edits = [halve(self.prefix)]
        follow(trainer, pl_module, self.network_path, edits, apply_edits(network, edits))
        for listener in listeners:
            listener.after_edits(trainer, pl_module, self.network_path, edits, {"7.weight[0]": "reaches the output"})


def batches(seed: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 1, 8, 8, generator=draw)
    y = (x[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (x[:, 0, 4:].mean((1, 2)) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle)


def make_trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | settings))


def report(folder: Path, **settings: Any) -> CompressionReport:
    defaults: dict[str, Any] = {"metric": "val/acc", "latency": False, "table": False}
    return CompressionReport(folder / "net.safetensors", **(defaults | settings))


def fit(folder: Path, *callbacks: L.Callback, module: L.LightningModule | None = None, **settings: Any) -> Any:
    L.seed_everything(1, verbose=False)
    trainer = make_trainer(folder, *callbacks, **settings)
    module = module or Task()
    trainer.fit(module, batches(shuffle=True), batches(1))
    return trainer, module


def test_figures_are_those_of_the_reloaded_file(tmp_path: Path) -> None:
    class Scores(L.Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                self.values.append(float(trainer.callback_metrics["val/acc"]))

    scores = Scores()
    _, module = fit(tmp_path, Halve(), report(tmp_path, latency=True, batch_sizes=[1, 4]), scores)
    results = Results.load(tmp_path / "results.json")
    metric, small = results.metric, results.compressed
    assert metric is not None
    assert small is not None
    assert (metric.dense, metric.compressed) == (scores.values[0], scores.values[-1])
    assert "epoch 1" in metric.note

    loaded = load_compressed(tmp_path / "net.safetensors", make_net())
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(x), module.net.eval()(x))
    assert results.dense.params == sum(p.numel() for p in make_net().parameters())
    assert small.params == sum(p.numel() for p in loaded.parameters())
    assert small.bytes == (tmp_path / "net.safetensors").stat().st_size
    assert results.dense.macs == 64 * WIDTH * 9 + 36 * WIDTH * 6 * 9 + 24
    assert small.macs == 64 * 4 * 9 + 36 * 4 * 6 * 9 + 24
    assert set(results.dense.latency) == set(small.latency) == {1, 4}

    rows = {row.tensor: row for row in results.layers}
    assert rows["0.weight"].before == (WIDTH, 1, 3, 3)
    assert rows["0.weight"].after == (4, 1, 3, 3)
    assert (rows["3.weight"].macs_before, rows["3.weight"].macs_after) == (36 * WIDTH * 54, 36 * 4 * 54)
    assert "7.weight" not in rows
    assert results.frozen == {"7.weight[0]": "reaches the output"}
    assert {row.unit: (row.requested, row.reached) for row in results.budgets} == {
        "macs": (0.6, small.macs / results.dense.macs),
        "params": (400, small.params),
    }
    assert results.edits == {"halve": 1}
    assert (results.artifact, results.network) == ("net.safetensors", "net")
    assert results.environment["seed"] == 1
    assert results.environment["torch"] == torch.__version__
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "results.json"]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    _, plain = fit(tmp_path, Halve())
    _, reported = fit(tmp_path, Halve(), report(tmp_path))
    left, right = plain.state_dict(), reported.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_nothing_compressed_reports_the_dense_network(tmp_path: Path) -> None:
    _, module = fit(tmp_path, report(tmp_path))
    results = Results.load(tmp_path / "results.json")
    assert results.compressed is None
    assert results.metric is not None
    assert results.metric.dense is not None
    assert results.metric.compressed is None
    assert results.dense.bytes == (tmp_path / "net.safetensors").stat().st_size
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(load_compressed(tmp_path / "net.safetensors", make_net())(x), module.net.eval()(x))


def test_no_metric_needs_no_validation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Halve(), report(tmp_path, metric=None))
    trainer.fit(Task(), batches())
    assert Results.load(tmp_path / "results.json").metric is None


def test_a_metric_without_validation_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"'val/acc' needs validation"):
        make_trainer(tmp_path, report(tmp_path)).fit(Task(), batches())
    assert os.listdir(tmp_path) == []


def test_an_unknown_metric_is_refused_before_training(tmp_path: Path) -> None:
    class Steps(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("training has begun")

    with pytest.raises(MisconfigurationException, match=r"'val/accuracy'.*it logs val/acc, val/loss"):
        fit(tmp_path, Steps(), report(tmp_path, metric="val/accuracy"))
    assert os.listdir(tmp_path) == []


def test_a_module_that_cannot_be_copied_is_refused_before_training(tmp_path: Path) -> None:
    module = Task()
    module.file = (tmp_path / "open").open("w")
    with pytest.raises(MisconfigurationException, match=r"Task, and it cannot be copied.*name no metric"), module.file:
        fit(tmp_path, report(tmp_path), module=module)
    fit(tmp_path, Halve(), report(tmp_path, metric=None), module=module)  # without a metric there is no need


def test_wrapped_steps_and_watching_hooks_are_not_taken_along(tmp_path: Path) -> None:
    """What another callback hangs on the module (distillation does) belongs to the training, not to the copies."""

    class Watcher(L.Callback):
        seen = 0

        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            step = pl_module.training_step
            pl_module.training_step = lambda batch, batch_idx: step(batch, batch_idx)
            pl_module.validation_step = lambda batch, batch_idx: Task.validation_step(pl_module, batch, batch_idx)
            pl_module.net.register_forward_hook(self.look)
            self.trainer = trainer  # a deep copy of this hook would copy the Trainer

        def look(self, *_: Any) -> None:
            self.seen += 1

        def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
            raise AssertionError("copied")

    watcher = Watcher()
    _, module = fit(tmp_path, watcher, Halve(), report(tmp_path), num_sanity_val_steps=0)
    assert watcher.seen >= 3 * (3 + 3)
    results = Results.load(tmp_path / "results.json")
    assert results.metric is not None
    assert module.accuracy._update_count == 0 or results.metric.compressed is not None
    loaded = Task()
    loaded.net = load_compressed(tmp_path / "net.safetensors", loaded.net)
    [values] = make_trainer(tmp_path).validate(loaded, batches(1), verbose=False)
    assert values["val/acc"] == results.metric.compressed


def test_the_users_data_module_prepares_the_data(tmp_path: Path) -> None:
    """Its transfer hooks are used, and see a Trainer that validates."""

    class Data(L.LightningDataModule):
        classes = 4
        loaded = 0

        def train_dataloader(self) -> DataLoader[Any]:
            return batches()

        def val_dataloader(self) -> DataLoader[Any]:
            self.loaded += 1
            return batches(1)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return (x + torch.randn_like(x), y) if self.trainer.training else (x * 3 - 1, y)

    class Asking(Task):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            assert self.trainer.datamodule.classes == 4
            assert abs(float(batch[0].mean()) + 1) < 0.5
            super().validation_step(batch, batch_idx)

    data, module = Data(), Asking()
    trainer = make_trainer(tmp_path, Halve(), report(tmp_path))
    trainer.fit(module, data)
    assert data.trainer is trainer
    assert module.trainer is trainer
    assert data.loaded == 1
    [values] = make_trainer(tmp_path).validate(module, data, verbose=False)
    metric = Results.load(tmp_path / "results.json").metric
    assert metric is not None
    assert metric.compressed == values["val/acc"]


def test_the_module_itself_may_be_the_network(tmp_path: Path) -> None:
    class Whole(Task):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x) * self.scale, y)

    _, module = fit(tmp_path, Halve(path="", prefix="net."), report(tmp_path), module=Whole())
    results = Results.load(tmp_path / "results.json")
    assert results.network == ""
    assert results.metric is not None
    loaded = load_compressed(tmp_path / "net.safetensors", Whole())
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded.net(x), module.net.eval()(x))
    [values] = make_trainer(tmp_path).validate(loaded, batches(1), verbose=False)
    assert values["val/acc"] == results.metric.compressed


def test_a_resumed_run_knows_the_dense_metric(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    keep = ModelCheckpoint(whole, "{epoch}", save_top_k=-1)
    fit(tmp_path, Halve(), report(whole), keep)
    for epoch in (0, 1, 2):  # saved before the edit, after it, and when there is nothing left to train
        part = tmp_path / f"part{epoch}"
        trainer = make_trainer(tmp_path, Halve(), report(part))
        resumed = Task()
        trainer.fit(resumed, batches(shuffle=True), batches(1), ckpt_path=whole / f"epoch={epoch}.ckpt")
        one, other = Results.load(whole / "results.json"), Results.load(part / "results.json")
        assert one.metric is not None
        assert other.metric is not None
        assert other.metric.dense == one.metric.dense is not None
        assert other.metric.note == one.metric.note
        assert other.dense.macs == one.dense.macs
        assert (other.dense.nonzero is None) == (epoch > 0)
        assert other.layers == one.layers
        assert other.frozen == one.frozen


def test_a_network_that_was_cut_before_has_no_dense_metric(tmp_path: Path) -> None:
    module = Task()
    apply_edits(module.net, [halve()])
    fit(tmp_path, report(tmp_path), module=module)
    results = Results.load(tmp_path / "results.json")
    assert results.metric is not None
    assert results.metric.dense is None
    assert "unknown" in results.metric.note
    assert results.compressed is not None
    assert results.dense.params > results.compressed.params


def test_figures_go_to_the_loggers(tmp_path: Path) -> None:
    class Offline(WandbLogger):
        """W&B's logger, with a run that is lists."""

        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []
            self.over_epochs: list[str] = []

        @property
        def experiment(self) -> Any:
            return self

        def define_metric(self, name: str, step_metric: str) -> None:
            assert step_metric == "epoch"
            self.over_epochs.append(name)

        def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
            self.logged.append(dict(metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def finalize(self, status: str) -> None: ...

        def after_save_checkpoint(self, *_: Any) -> None: ...

    board = Offline()
    fit(tmp_path, Halve(), report(tmp_path), logger=[CSVLogger(tmp_path, "csv", ""), board])
    results = Results.load(tmp_path / "results.json")
    figures = results.figures()
    assert results.compressed is not None
    costs = [(row["epoch"], row["compress/macs"]) for row in board.logged if "compress/macs" in row]
    dense, small = results.dense.macs, results.compressed.macs
    assert costs[0] == (0, dense)
    assert costs[1][1] == costs[-1][1] == small
    assert {"val/acc", "compress/macs", "compress/bytes"} <= set(board.over_epochs)
    [final] = [row for row in board.logged if "compress/ratio/macs" in row]
    assert {f"compress/{name}" for name in figures if not name.startswith("compressed/")} < set(final)
    assert final["compress/metric"] == figures["compressed/metric"]
    [table] = [row["compress/layers"] for row in board.logged if "compress/layers" in row]
    assert [row[0] for row in table.data] == [layer.tensor for layer in results.layers]
    written = (tmp_path / "csv" / "metrics.csv").read_text()
    assert "compress/ratio/macs" in written.splitlines()[0]
    assert str(figures["ratio/macs"]) in written


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"limit_val_batches": 1, "num_sanity_val_steps": 0},
        {"precision": "bf16-mixed"},
        {"check_val_every_n_epoch": 5, "num_sanity_val_steps": 0},
        {"accumulate_grad_batches": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_works_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer, module = fit(tmp_path, Halve(epoch=0), report(tmp_path), **settings)
    results = Results.load(tmp_path / "results.json")
    assert results.metric is not None
    assert results.compressed is not None
    limits = {name: settings[name] for name in ("precision",) if name in settings}
    limit = trainer.limit_val_batches
    [values] = make_trainer(tmp_path, limit_val_batches=limit, **limits).validate(module, batches(1), verbose=False)
    assert results.metric.compressed == values["val/acc"]


def test_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Halve(), report(tmp_path, table=True))
    shown = capsys.readouterr().out
    for part in ("val/acc", "MACs per sample", "8 × 1 × 3 × 3", "budget of macs"):
        assert part in shown
    assert "lightning.pytorch.accelerators" not in shown


def test_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, Halve(), report(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def failing(_: Any) -> Any:
        raise OSError("disk full")
        yield

    monkeypatch.setattr(container, "_contents", failing)
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, Halve(epoch=2), report(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_one_callback_serves_several_fits(tmp_path: Path) -> None:
    callback = report(tmp_path)
    fit(tmp_path, Halve(), callback)
    first = Results.load(tmp_path / "results.json")
    fit(tmp_path, Halve(), callback)
    second = Results.load(tmp_path / "results.json")
    assert first.metric == second.metric
    assert first.dense == second.dense


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"path": ""}, "`path` must name a file"),
        ({"path": "/"}, "`path` must name a file"),
        ({"results": "."}, "`results` must name a file"),
        ({"path": "a", "results": "a"}, "must differ"),
        ({"metric": ""}, "`metric`"),
        ({"metric": 3}, "`metric`"),
        ({"batch_sizes": ()}, "`batch_sizes`"),
        ({"batch_sizes": (0,)}, "`batch_sizes`"),
        ({"batch_sizes": (1.5,)}, "`batch_sizes`"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CompressionReport(**settings)


def test_two_processes_write_once_and_agree(tmp_path: Path) -> None:
    """Run in processes of their own: each holds half of the data, the figures are of all of it."""
    package = Path(lightning_compress.__file__).parent.parent
    subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    results = Results.load(tmp_path / "results.json")
    assert results.metric is not None
    assert results.environment["processes"] == 2
    loaded = Task()
    loaded.net = load_compressed(tmp_path / "net.safetensors", loaded.net)
    [values] = make_trainer(tmp_path).validate(loaded, batches(1), verbose=False)
    assert results.metric.compressed == pytest.approx(values["val/acc"], abs=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "results.json"]


def main(arguments: Sequence[str]) -> None:
    fit(Path(arguments[0]), Halve(), report(Path(arguments[0])), devices=2, strategy="ddp")


if __name__ == "__main__":
    main(sys.argv[1:])


class Untranslatable(nn.Module):
    """An operation that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.special.bessel_j0(x)


class TestFiles:
    """ONNX files beside the artifact."""

    def fit(self, folder: Path, net: nn.Module, **settings: Any) -> tuple[CompressionReport, L.LightningModule]:
        module = Task()
        module.net = nn.Sequential(*module.net, net)  # type: ignore[assignment]
        callback = report(folder, **settings)
        quantization = Quantization(bits=8, samples=16, start=1.0)
        fit(folder, quantization, callback, module=module, max_epochs=1)
        return callback, module

    def test_of_a_network_that_onnx_cannot_express_there_are_none_and_the_rest_is_there(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="writes no ONNX files"):
            callback, _ = self.fit(tmp_path, Untranslatable())
        assert {file.name for file in tmp_path.iterdir()} == {"net.safetensors", "results.json"}
        assert callback.results is not None
        assert not callback.results.deployed
        assert Results.load(tmp_path / "results.json") == callback.results

    def test_asked_for_they_are_missed_loudly_and_after_the_results_are_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError):
            self.fit(tmp_path, Untranslatable(), onnx=True)
        assert Results.load(tmp_path / "results.json").compressed is not None

    def test_without_their_packages_they_are_refused_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_compress.deployment.find_spec", lambda name: None)
        with pytest.raises(MisconfigurationException, match=r"lightning-compress\[export\]"):
            fit(tmp_path, report(tmp_path, onnx=True))
        assert not (tmp_path / "net.safetensors").exists()
