"""Weights of few values: always values but inside an optimizer's step, through checkpoints, beside other methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress import (
    Budget,
    ChannelPruning,
    Distillation,
    LowBitWeights,
    LowRankFactorization,
    WeightPruning,
    WeightSharing,
)
from lightning_compress.artifact import artifact_bytes, load_compressed, save_compressed
from lightning_compress.edits import companion, history
from tests.contract.runs import EPOCHS, Task, data, fit, task

VALUES = {"binary": 2, "xnor": 2, "ternary": 3, "ttq": 3, "dkm": 4}
every_kind = pytest.mark.parametrize("kind", VALUES)


def low_bit(kind: str, **options: Any) -> LowBitWeights:
    life: dict[str, Any] = {"start": 1, "harden": 3} if kind == "dkm" else {"start": 1}
    return LowBitWeights(kind, **{**life, **options})


def latents(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = ((name, weight, companion(net, name, "latent")) for name, weight in net.named_parameters())
    return {name: (weight.detach(), latent) for name, weight, latent in found if latent is not None}


def count(weight: Tensor, kind: str) -> int:
    """Of different values, in a layer or in a channel."""
    return max(len(part.unique()) for part in (weight if kind == "xnor" else [weight]))


class Watch(L.Callback):
    """Whenever anyone looks, weights are values; and they move."""

    def __init__(self, kind: str, hard: int = 3) -> None:
        self.kind, self.hard = kind, hard
        self.seen: list[Tensor] = []

    def look(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        found = latents(pl_module.net)
        if self.kind != "dkm" or trainer.current_epoch >= self.hard:
            for name, (weight, latent) in found.items():
                assert count(weight, self.kind) <= VALUES[self.kind], name
                assert len(latent.unique()) > weight.numel() // 4 or self.kind == "binary", name
        if found:
            self.seen.append(torch.cat([latent.flatten() for _, latent in found.values()]))

    on_train_batch_start = on_train_batch_end = on_before_optimizer_step = on_before_zero_grad = look
    on_validation_start = on_validation_end = on_save_checkpoint = look


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[n])) for n, v in a.items())


@every_kind
def test_resumed_equals_uninterrupted(kind: str, tmp_path: Path) -> None:
    """Weights, latents, momenta and memories, from every epoch."""
    module, callback, watch = task("residual"), low_bit(kind), Watch(kind)
    straight = fit(module, tmp_path / "straight", callback, watch)
    assert any(not torch.equal(watch.seen[-1], other) for other in watch.seen[:-1])
    for epoch in range(EPOCHS - 1):
        again, second = task("residual"), low_bit(kind)
        resumed = fit(again, tmp_path / str(epoch), second, ckpt=tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(again.state_dict(), module.state_dict()), epoch
        assert same(second.lending.memory, callback.lending.memory), epoch
        ours, theirs = (run.optimizers[0].state_dict()["state"] for run in (resumed, straight))
        assert all(same(values, ours[place]) for place, values in theirs.items())


@every_kind
def test_few_values_are_left_and_the_artifact_has_them(kind: str, tmp_path: Path) -> None:
    module = task("residual")
    before = artifact_bytes(module.net)
    fit(module, tmp_path, low_bit(kind))
    found = latents(module.net)
    assert found.keys() == {"a.0.0.weight", "a.1.weight", "b.0.0.weight", "b.1.weight", "shortcut.weight"}
    for weight, _ in found.values():
        assert count(weight, kind) == VALUES[kind]
    save_compressed(module.net, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a", task("residual").net)
    assert history(loaded) == ()
    state = module.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), module.net.eval()(x))
    assert (tmp_path / "a").stat().st_size < {"xnor": 0.2, "dkm": 0.2}.get(kind, 0.15) * before


def test_a_step_is_that_of_binary_connect(tmp_path: Path) -> None:
    """Forward and backward with signs, the step on the real weights, clipped: a loop written by hand, to the bit."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    module = task("residual", optimizer="SGD", **options)
    fit(module, tmp_path, LowBitWeights("binary", ends=True), max_epochs=3, gradient_clip_val=0.5)

    net = task("residual").net
    optimizer = torch.optim.SGD(net.parameters(), **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    held = [weight for weight in net.parameters() if weight.dim() >= 2]
    scales = [float(weight.detach().abs().mean()) for weight in held]
    real = [weight.detach().clamp(-scale, scale) for weight, scale in zip(held, scales, strict=True)]
    for _ in range(3):
        for x, y in data():
            with torch.no_grad():
                for weight, latent, scale in zip(held, real, scales, strict=True):
                    weight.copy_(torch.where(latent >= 0, scale, -scale))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for weight, latent in zip(held, real, strict=True):
                    weight.copy_(latent)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            real = [weight.detach().clamp(-scale, scale) for weight, scale in zip(held, scales, strict=True)]
        schedule.step()
    for (weight, latent), wanted, scale in zip(latents(module.net).values(), real, scales, strict=True):
        assert torch.equal(latent, wanted)
        assert torch.equal(weight, torch.where(wanted >= 0, scale, -scale))
    others = [(name, p) for name, p in module.net.named_parameters() if p.dim() < 2]
    assert all(torch.equal(parameter, net.get_parameter(name)) for name, parameter in others)


@every_kind
def test_a_step_that_a_gradient_scaler_skips_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    state: dict[str, Any] = {}

    class Overflow(Watch):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.global_step == 6 and trainer.callback_metrics:
                pl_module.net.head.bias.grad.fill_(torch.inf)
                state["before"] = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}
                state["latent"] = {n: latent.clone() for n, (_, latent) in latents(pl_module.net).items()}
                state["memory"] = {n: v.clone() for n, v in callback.lending.memory.items()}

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if state and "checked" not in state:
                state["checked"] = True
                assert same(dict(pl_module.net.named_parameters()), state["before"])
                assert same({n: latent for n, (_, latent) in latents(pl_module.net).items()}, state["latent"])
                assert same(callback.lending.memory, state["memory"])
            self.look(trainer, pl_module)

    callback = low_bit(kind)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = task("residual")
    running = fit(module, tmp_path, Overflow(kind), callback, plugins=[precision])
    assert state["checked"]
    assert precision.scaler.get_scale() < 2.0**16  # so it was skipped
    assert running.global_step > 6
    assert all(count(weight, kind) <= VALUES[kind] for weight, _ in latents(module.net).values())


class Spy(torch.optim.SGD):
    """What it is given, when its arithmetic begins; a step of the class that it inherits from is inside of its own."""

    seen: tuple[list[int], ...] = ()
    fails_at = -1
    steps = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        type(self).steps += 1
        type(self).seen = tuple(
            [len(p.unique()) for p in group["params"] if p.dim() >= 2] for group in self.param_groups
        )
        if type(self).steps == self.fails_at:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("out of memory, say")
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.001 * torch.randn_like(parameter))
        return None


@pytest.fixture
def spy() -> Iterator[type[Spy]]:
    torch.optim.Spy = Spy  # type: ignore[attr-defined]
    Spy.seen, Spy.fails_at, Spy.steps = (), -1, 0
    yield Spy
    del torch.optim.Spy  # type: ignore[attr-defined]


@every_kind
def test_optimizers_have_latents_and_all_that_they_do_to_them(kind: str, spy: type[Spy], tmp_path: Path) -> None:
    """Noise after the step too, in an optimizer that calls the step of its base."""
    module = task("residual", optimizer="Spy", lr=0.01, momentum=0.9)
    fit(module, tmp_path, low_bit(kind, ends=True), Watch(kind), accumulate_grad_batches=2, gradient_clip_val=0.5)
    sizes = [weight.numel() for weight in module.net.parameters() if weight.dim() >= 2]
    assert all(seen > 0.3 * size for seen, size in zip(spy.seen[0], sizes, strict=True))  # real numbers, not values


def test_after_an_error_in_a_step_weights_are_values(spy: type[Spy], tmp_path: Path) -> None:
    spy.fails_at = 8
    module = task("residual", optimizer="Spy", lr=0.01)
    saving = OnExceptionCheckpoint(tmp_path, "error")
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, tmp_path, saving, low_bit("ternary", ends=True), Watch("ternary"))
    assert all(len(weight.unique()) <= 3 for weight, _ in latents(module.net).values())
    assert float(latents(module.net)["stem.0.weight"][1].mean()) > 0.9  # what was done of the step stays
    state = torch.load(tmp_path / "error.ckpt", weights_only=True)["state_dict"]
    assert len(state["net.a.1.weight"].unique()) == 3
    assert torch.equal(state["net.a.1.weight"], module.net.get_parameter("a.1.weight"))


class Manual(Task):
    """Two optimizers; the second steps every other time, once by itself, and once with a closure that fails."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(task("residual").net)
        self.automatic_optimization = False
        self.seen: list[tuple[bool, bool]] = []

    def configure_optimizers(self) -> Any:
        parts = (self.net.a, nn.ModuleList([self.net.stem, self.net.b, self.net.shortcut, self.net.head]))
        optimizers = [torch.optim.SGD(part.parameters(), 0.05, momentum=0.9) for part in parts]
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.note())
        return optimizers

    def note(self) -> None:
        """Which of the two has latents now."""
        names = ("a.1.weight", "b.1.weight")
        self.seen.append(tuple(len(self.net.get_parameter(n).unique()) > 3 for n in names))  # type: ignore[arg-type]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch

        def loss() -> Tensor:
            value = nn.functional.cross_entropy(self.net(x), y)
            self.zero_grad()
            self.manual_backward(value)
            return value

        def fail() -> Tensor:
            raise ValueError("a loss that is not finite, say")

        first, second = self.optimizers()
        loss()
        first.step()
        loss()
        if batch_idx == 1:
            with pytest.raises(ValueError, match="not finite"):
                second.step(closure=fail)
        if batch_idx % 2:
            second.step(closure=loss)
        else:
            self.optimizers(use_pl_optimizer=False)[1].step()  # Lightning's hooks do not hear of it


@every_kind
def test_several_optimizers_in_manual_optimization(kind: str, tmp_path: Path) -> None:
    module, watch = Manual(), Watch(kind, hard=4)
    fit(module, tmp_path, LowBitWeights(kind), watch)
    # Hooks of the module come first, and see latents only where a closure does not come after.
    assert len({tuple(seen.tolist()) for seen in watch.seen}) >= EPOCHS * 4
    if kind == "ternary":
        assert not any(any(pair) for pair in module.seen)
    assert all(count(weight, kind) <= VALUES[kind] for weight, _ in latents(module.net).values())


def test_lbfgs_evaluates_its_closure_with_values(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append(len(self.net.a[1].weight.unique()))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(1)
    module = Look(task("residual").net, optimizer="LBFGS", lr=0.1, max_iter=3)
    first = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    fit(module, tmp_path, LowBitWeights("ternary"), max_epochs=2)
    assert len(seen) >= 2 * 2 * 4 + 2
    assert set(seen[2:]) == {3}  # the first are the dry steps that tell how the network is called
    assert all(not torch.equal(latent, first[name]) for name, (_, latent) in latents(module.net).items())


@pytest.mark.parametrize("kind", ["binary", "ttq", "dkm"])
@pytest.mark.parametrize("order", ["latents first", "channels first"])
def test_beside_channel_pruning(order: str, kind: str, tmp_path: Path) -> None:
    """Latents are cut with their weights; what the refit writes to these is taken back."""
    when = (1, 2) if order == "latents first" else (2, 1)

    def callbacks() -> list[L.Callback]:
        channels = ChannelPruning(Budget(macs=0.6), start=when[1], end=when[1], steps=1, samples=32)
        return [low_bit(kind, start=when[0]), channels, Watch(kind)]

    module = task("residual")
    fit(module, tmp_path / "a", *callbacks())
    found = latents(module.net)
    assert found["b.1.weight"][0].numel() < 32 * 32 * 9
    for name, (weight, latent) in found.items():
        assert weight.shape == latent.shape, name
        assert count(weight, kind) <= VALUES[kind], name
    again = task("residual")
    fit(again, tmp_path / "b", *callbacks(), ckpt=tmp_path / "a" / "epoch=3.ckpt")
    assert same(again.state_dict(), module.state_dict())


def test_two_kinds_and_shared_weights_share_out_a_network(tmp_path: Path) -> None:
    module = task("residual")
    sharing = WeightSharing(3, start=1, exclude=["stem", "a", "b", "shortcut"])
    first, second = low_bit("ternary", exclude=["b", "shortcut"]), low_bit("binary", exclude=["a"])
    fit(module, tmp_path, first, second, sharing, Distillation("self"))
    counts = {name: len(p.unique()) for name, p in module.net.named_parameters() if p.dim() >= 2}
    assert counts == {
        "stem.0.weight": 144, "a.0.0.weight": 3, "a.1.weight": 3, "b.0.0.weight": 2, "b.1.weight": 2,
        "shortcut.weight": 2, "head.weight": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([WeightPruning(0.5)], "WeightPruning and LowBitWeights both decide on the values of a.0.0.weight"),
        ([WeightSharing(3)], "WeightSharing and LowBitWeights both decide on the values of a.0.0.weight"),
        ([LowBitWeights("binary")], "LowBitWeights and LowBitWeights both decide"),
        ([EMAWeightAveraging()], "EMAWeightAveraging and LowBitWeights do not go together"),
    ],
)
def test_what_does_not_compose_is_refused_before_training(
    others: list[L.Callback], message: str, tmp_path: Path
) -> None:
    module = task("residual")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, tmp_path, low_bit("ternary"), *others)
    assert same(module.state_dict(), before)


@pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")
def test_layers_are_replaced_before_not_after(tmp_path: Path) -> None:
    low_rank: dict[str, Any] = {"samples": 32, "round_to": 1, "steps": 1}
    module = task("residual")
    first = LowRankFactorization(Budget(macs=0.8), start=1, end=1, **low_rank)
    fit(module, tmp_path / "a", first, low_bit("ternary", start=2))
    assert all(len(weight.unique()) <= 3 for weight, _ in latents(module.net).values())
    late = LowRankFactorization(Budget(macs=0.8), start=3, end=3, **low_rank)
    with pytest.raises(ValueError, match="pruned or shared or latent"):
        fit(task("residual"), tmp_path / "b", low_bit("ternary", ends=True), late)


def test_training_that_ends_early_leaves_hard_values(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch >= 1
            assert len(pl_module.net.a[1].weight.unique()) > 4

    module = task("residual")
    with pytest.warns(UserWarning, match="training ended before LowBitWeights's last edit"):
        fit(module, tmp_path, LowBitWeights("dkm"), Stop(), min_epochs=1)
    assert all(len(weight.unique()) == 4 for weight, _ in latents(module.net).values())


@pytest.mark.parametrize(
    ("start", "harden", "at"), [(0.0, None, 4), (1, None, 4), (4, None, 4), (0.9, None, 4), (0, 2, 2)]
)
def test_soft_values_become_hard_in_time(start: Any, harden: Any, at: int, tmp_path: Path) -> None:
    """By default after 0.8 of training, and one epoch before its end at the latest."""
    seen = []

    class Look(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(len(pl_module.net.a[1].weight.unique()) <= 4)

    fit(task("residual"), tmp_path, LowBitWeights("dkm", start=start, harden=harden), Look())
    assert seen == [epoch >= at for epoch in range(EPOCHS)]


def test_weights_that_were_trained_on_without_the_callback_are_not_set_back(tmp_path: Path) -> None:
    """Latents of a run before say nothing of weights that went on since."""
    module = task("residual")
    fit(module, tmp_path / "a", low_bit("ternary"))
    fit(module, tmp_path / "b", max_epochs=1)
    moved = {name: weight.clone() for name, (weight, _) in latents(module.net).items()}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                assert all(torch.equal(weight, moved[name]) for name, (weight, _) in latents(pl_module.net).items())

    fit(module, tmp_path / "c", low_bit("binary"), Look())
    assert all(len(weight.unique()) == 2 for weight, _ in latents(module.net).values())


def test_in_bfloat16(tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path / "a", low_bit("dkm"), precision="bf16-mixed")
    assert all(len(weight.unique()) == 4 for weight, _ in latents(module.net).values())
    with pytest.raises(MisconfigurationException, match=r"is torch\.bfloat16, and latents train in float32"):
        fit(task("residual"), tmp_path / "b", low_bit("ternary"), precision="bf16-true")


def test_scales_are_not_trained_on_gradients_that_are_scaled(tmp_path: Path) -> None:
    module = task("residual", lr=0.01, fused=True)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="leave out fused=True"):
        fit(module, tmp_path, low_bit("ttq"), plugins=[precision])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quaternary"}, "`kind` must be one of"),
        ({"bits": 2}, "`bits` goes with kind='dkm'"),
        ({"harden": 0.5}, "`harden` goes with kind='dkm', got harden=0.5 with kind='ternary'"),
        ({"kind": "dkm", "start": 0.5, "harden": 0.3}, "`start` must not be after `end`"),
        ({"ends": 1}, "`ends` must be true or false, got 1"),
        ({"start": 1.5}, r"`start` as a float is a fraction of training in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowBitWeights(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["sterm"]}, "'sterm' matches no parameter and no module"),
        ({"exclude": ["a", "b", "shortcut"]}, "finds no weight to work on: stem.0.weight is in the first or the last"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(task("residual"), tmp_path, low_bit("ternary", **options))
