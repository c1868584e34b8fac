"""Quantization in runs: after training or within it; steps, bits and BatchNorm on the way; beside other callbacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from lightning_compress import Budget, ChannelPruning, CompressionReport, Distillation, WeightPruning
from lightning_compress.artifact import artifact_bytes, load_compressed, save_compressed
from lightning_compress.callbacks.quantization import Quantization
from lightning_compress.edits import history
from lightning_compress.methods.quantization import quantized_weights
from lightning_compress.quantized import scope_of
from tests.contract.nets import Residual
from tests.contract.runs import EPOCHS, Task, data, fit, task

BATCHES = 4


def quantization(bits: Any = 8, **options: Any) -> Quantization:
    """Quick to calibrate."""
    return Quantization(bits, **{"start": 1, "samples": 32, "rounding": "nearest", "target": "vnni", **options})


def steps(net: nn.Module) -> dict[str, Tensor]:
    """Steps and zero points, copied."""
    found = {}
    for path, module in net.named_modules():
        scope = scope_of(module)
        if scope is not None:
            names = [f"{leaf}_step" for leaf in scope.weights]
            names += [f"{prefix}_{what}" for prefix, _ in scope.grids() for what in ("step", "zero")]
            found |= {f"{path}.{name}".lstrip("."): module.get_buffer(name).detach().clone() for name in names}
    return found


def grids(net: nn.Module) -> dict[str, int]:
    """The largest integer of each weight."""
    return {name: grid.high for name, _, _, grid in quantized_weights(net)}


class Look(L.Callback):
    """What the network is in each epoch: before its first batch, behind its last, and behind each batch."""

    def __init__(self, what: Any) -> None:
        self.what = what
        self.begun: list[Any] = []
        self.ended: list[Any] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.begun.append(self.what(pl_module.net))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.batches.append(self.what(pl_module.net))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.ended.append(self.what(pl_module.net))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class TestAfterTraining:
    def test_reported_is_the_quantized_network_and_checkpoints_hold_the_other(self, tmp_path: Path) -> None:
        module, look = task("residual"), Look(lambda net: len(history(net)))
        report = CompressionReport(
            tmp_path / "out" / "net.safetensors", metric="val_acc", latency=False, table=False, onnx=False
        )
        fit(module, tmp_path / "run", look, quantization(start=1.0), report)
        assert look.ended == [0] * EPOCHS
        assert len(history(module.net)) == 1
        loaded, x = load_compressed(tmp_path / "out" / "net.safetensors", Residual()), torch.randn(4, 1, 8, 8)
        assert history(loaded) == history(module.net)
        assert torch.equal(loaded(x), module.net.eval()(x))
        assert report.results is not None
        assert report.results.compressed is not None
        assert report.results.compressed.bytes == (tmp_path / "out" / "net.safetensors").stat().st_size
        dense = task("residual").net.state_dict()
        for file in ("epoch=4.ckpt", "last.ckpt"):
            state = torch.load(tmp_path / "run" / file, weights_only=True)["state_dict"]
            assert {name.removeprefix("net.") for name in state if name.startswith("net.")} == set(dense)

    def test_it_is_the_network_of_a_run_without(self, tmp_path: Path) -> None:
        """Training knows nothing of it; what it calibrates on leaves no trace."""
        plain, module = task("residual"), task("residual")
        fit(plain, tmp_path / "a")
        fit(module, tmp_path / "b", quantization(start=1.0))
        state = module.net.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.net.state_dict().items() if value.dim() < 2)
        x = next(iter(data(64)))[0]
        with torch.no_grad():
            a, b = plain.net.eval()(x), module.net.eval()(x)
        assert (a - b).square().mean() < 0.01 * a.var()
        assert not torch.equal(a, b)

    def test_a_report_that_comes_first_is_refused(self, tmp_path: Path) -> None:
        report = CompressionReport(tmp_path / "net.safetensors", latency=False, onnx=False)
        with pytest.raises(MisconfigurationException, match="name it before CompressionReport"):
            fit(task("residual"), tmp_path, report, quantization(start=1.0))
        assert not list(tmp_path.glob("*.ckpt"))

    @pytest.mark.parametrize("start", [1.0, 3])
    @pytest.mark.parametrize("rounding", ["nearest", "joint"])
    def test_a_budget_of_bytes_is_that_of_the_artifact(self, start: Any, rounding: str, tmp_path: Path) -> None:
        module = task("residual")
        limit = round(0.3 * artifact_bytes(module.net))
        callback = quantization(budget=Budget(bytes=0.3), start=start, rounding=rounding)
        fit(module, tmp_path, callback)
        save_compressed(module.net, tmp_path / "net")
        assert (tmp_path / "net").stat().st_size <= limit
        assert len(set(callback.bits.values())) > 1


class TestSteps:
    @pytest.mark.parametrize("learn", ["lsq", "lsq+", "pact", "fixed"])
    def test_what_each_rule_trains(self, learn: str, tmp_path: Path) -> None:
        module, look = task("residual"), Look(steps)
        trainer = fit(module, tmp_path, look, quantization(4, learn=learn, step_lr=0.02, freeze=1.0))
        first, last = look.batches[BATCHES], look.batches[-1]  # of the epoch that began with the edit
        moved = {name for name in first if not torch.equal(first[name], last[name])}
        weights = {name for name in first if name.endswith("weight_step")}
        zeros = {name for name in first if name.endswith("_zero")}
        values = set(first) - weights - zeros
        wanted: dict[str, set[str]] = {"lsq": weights | values, "lsq+": set(first), "pact": values, "fixed": set()}
        assert moved <= wanted[learn]
        assert len(moved & values) >= (0 if learn == "fixed" else len(values) - 3)  # where something is clipped
        assert learn not in ("lsq", "lsq+") or moved >= weights
        assert (learn == "lsq+") == bool(moved & zeros)
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in module.net.parameters()}
        assert not any(buffer.requires_grad or buffer.grad is not None for buffer in module.net.buffers())
        assert all(float(value.min()) > 0 for name, value in last.items() if name.endswith("_step"))

    def test_steps_are_trained_by_the_gradient_of_the_loss(self, tmp_path: Path) -> None:
        """Of Adam's first, in octaves: as far as the rate says, against the sign of the gradient."""
        seen: dict[str, Any] = {}

        class Gradients(L.Callback):
            def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
                if trainer.global_step == BATCHES:
                    found = {n: b for n, b in pl_module.net.named_buffers() if b.grad is not None}
                    seen["before"] = {n: b.detach().clone() for n, b in found.items()}
                    seen["gradient"] = {n: b.grad.clone() for n, b in found.items()}

            def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
                if trainer.global_step == BATCHES + 1:
                    seen["after"] = {n: b.detach().clone() for n, b in pl_module.net.named_buffers()}

        fit(task("residual"), tmp_path, Gradients(), quantization(4, step_lr=0.01), max_epochs=2)
        assert len(seen["gradient"]) > 10
        for name, gradient in seen["gradient"].items():
            way = (seen["after"][name] / seen["before"][name]).log2()
            sure = gradient.abs() * seen["before"][name] > 1e-5
            assert torch.allclose(way[sure], -0.01 * gradient.sign()[sure], atol=1e-4), name

    def test_steps_stand_still_and_norms_are_frozen_towards_the_end(self, tmp_path: Path) -> None:
        """Norms once the learning rate, halved every other epoch, is a fifth of what it was."""

        def statistics(net: nn.Module) -> dict[str, Tensor]:
            return {name: b.detach().clone() for name, b in net.named_buffers() if name.endswith("running_mean")}

        modes = Look(lambda net: net.get_submodule("a.2").training)
        trained, norms = Look(steps), Look(statistics)
        module = task("residual")
        callback = quantization(4, start=2, freeze=0.5, step_lr=0.02)
        fit(module, tmp_path, trained, norms, modes, callback, max_epochs=8)
        still = [same(a, b) for a, b in zip(trained.begun, trained.ended, strict=True)]
        assert still[2:] == [False] * 3 + [True] * 3
        frozen = [same(a, b) for a, b in zip(norms.begun, norms.ended, strict=True)]
        assert frozen == [False] * 7 + [True]  # in epoch 6 they are brought up to date, once, and then frozen
        assert modes.batches[6 * BATCHES - 1 :] == [True] + [False] * 2 * BATCHES
        assert all(part.training for part in module.net.modules())

    def test_fewer_bits_by_and_by(self, tmp_path: Path) -> None:
        module, look = task("residual"), Look(grids)
        callback = quantization(2, start=1, end=4, learn="fixed")
        fit(module, tmp_path, callback, look)
        assert look.begun[0] == {}
        inner = [name for name in grids(module.net) if name not in ("stem.0.weight", "head.weight")]
        assert [{seen[name] for name in inner} for seen in look.begun[1:]] == [{127}, {7}, {3}, {1}]
        assert look.begun[1:] == look.ended[1:]
        assert all(seen["stem.0.weight"] == seen["head.weight"] == 127 for seen in look.begun[1:])
        save_compressed(module.net, tmp_path / "net")
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(load_compressed(tmp_path / "net", Residual())(x), module.net.eval()(x))


class TestBeside:
    @pytest.mark.parametrize("other", [ChannelPruning(Budget(macs=0.7), end=3, samples=32), WeightPruning(0.5, end=3)])
    def test_what_edits_later_is_refused_before_training(self, other: L.Callback, tmp_path: Path) -> None:
        module = task("residual")
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(MisconfigurationException, match=r"quantization comes last. Let `end` of \w+ be earlier"):
            fit(module, tmp_path, other, quantization(start=2))
        assert same(module.state_dict(), before)

    @pytest.mark.parametrize(
        "options",
        [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}, {"max_steps": 18}],
        ids=lambda options: next(iter(options)),
    )
    def test_other_ways_to_train(self, options: dict[str, Any], tmp_path: Path) -> None:
        module, look = task("residual"), Look(steps)
        fit(module, tmp_path, look, quantization(4, freeze=1.0, step_lr=0.02), **options)
        assert not same(look.batches[BATCHES], look.batches[-1])
        x, y = next(iter(data(64)))
        with torch.no_grad():
            output = module.net.eval()(x)
        assert torch.isfinite(output).all()
        assert (output.argmax(1) == y).float().mean() > 0.6

    @pytest.mark.parametrize("start", [1, 1.0])
    def test_averaged_weights(self, start: Any, tmp_path: Path) -> None:
        module = task("residual")
        averaging = EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
        fit(module, tmp_path, averaging, quantization(start=start))
        assert len(history(module.net)) == 1
        x, y = next(iter(data(64)))
        with torch.no_grad():
            assert (module.net.eval()(x).argmax(1) == y).float().mean() > 0.6
        save_compressed(module.net, tmp_path / "net")
        assert torch.equal(load_compressed(tmp_path / "net", Residual())(x), module.net(x))

    def test_taught_by_the_network_as_it_was(self, tmp_path: Path) -> None:
        module = task("residual")
        fit(module, tmp_path, Distillation("self"), quantization(4, start=2))
        assert len(history(module.net)) == 1

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_run_that_is_stopped_leaves_nothing_running(self, error: type[BaseException], tmp_path: Path) -> None:
        class Stops(Task):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if self.current_epoch == 2:
                    self.net.b[1].register_forward_hook(self.stop)
                return super().training_step(batch, batch_idx)

            def stop(self, *_: Any) -> None:
                raise error

        module = Stops(task("residual").net)
        with pytest.raises((error, SystemExit)):
            fit(module, tmp_path, quantization())
        assert not _get_current_function_mode_stack()
        assert not any(buffer.requires_grad for buffer in module.net.buffers())
        module.net.b[1]._forward_hooks.popitem()
        twin = copy.deepcopy(module.net)
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(twin.eval()(x), module.net.eval()(x))

    def test_two_in_one_run(self, tmp_path: Path) -> None:
        """Each has its network, and its place in checkpoints."""

        class Two(Task):
            def __init__(self) -> None:
                torch.manual_seed(1)
                super().__init__(Residual())
                self.other = Residual()

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = nn.functional.cross_entropy(self.other(batch[0]), batch[1])
                return super().training_step(batch, batch_idx) + loss

        pair = [quantization(network="net"), quantization(2, start=2, network="other")]
        assert pair[0].state_key != pair[1].state_key
        module = Two()
        fit(module, tmp_path, *pair)
        assert set(grids(module.net).values()) == {127}
        assert set(grids(module.other).values()) == {127, 1}
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
        assert [saved[callback.state_key]["bits"] for callback in pair] == [pair[0].bits, pair[1].bits]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "`bits` must be one of 8, 4, 3, 2, got 7"),
        ({"learn": "adam"}, "`learn` must be one of lsq"),
        ({"freeze": 2}, r"`freeze` must be a fraction in \[0, 1\], got 2"),
        ({"step_lr": 0}, r"`step_lr` must be in \(0, 1\], got 0"),
        ({"samples": 0}, "`samples` must be an integer of at least 1"),
        ({"end": 3}, "`end` goes with one number of bits below 8"),
        ({"bits": {"a": 4}, "end": 3}, "`end` goes with one number of bits below 8"),
        ({"start": 1.5}, r"`start` as a float is a fraction of training in \[0, 1\]"),
        ({"bits": 4, "start": 0.5, "end": 0.2}, "`start` must not be after `end`"),
        ({"budget": Budget(latency=0.5)}, "cannot keep a budget of latency"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantization(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["stemm"]}, "'stemm' matches no parameter and no module"),
        ({"bits": {"heads": 4}}, "'heads' matches no parameter and no module"),
        ({"exclude": ["*"]}, "there is no weight to quantize"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(task("residual"), tmp_path, quantization(**options))
    assert not list(tmp_path.glob("*.ckpt"))
