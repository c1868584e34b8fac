"""Pruning single weights: the dead stay dead, in every schedule, through checkpoints, beside other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress import Budget, ChannelPruning, LowRankFactorization, WeightPruning
from lightning_compress.artifact import artifact_bytes, load_compressed, save_compressed
from lightning_compress.edits import Companions, companion, history
from lightning_compress.methods.sparsity import Pattern, make_masks
from tests.contract.runs import EPOCHS, Task, data, fit, task, trainer

LIFE: dict[str, Any] = {"start": 1, "end": 3, "steps": 3, "floor": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "taylor": {"criterion": "taylor"},
    "movement": {"criterion": "movement", "schedule": "linear"},
    "snip": {"criterion": "snip", "start": 0.0, "schedule": "one_shot"},
    "grasp": {"criterion": "grasp", "start": 0.0, "schedule": "one_shot", "samples": 32},
    "wanda": {"criterion": "wanda", "allocation": "uniform"},
    "random": {"criterion": "random", "allocation": "erk"},
    "lamp": {"allocation": "lamp", "pattern": "block:2x2"},
    "kernel": {"pattern": "kernel"},
    "2:4": {"pattern": "2:4"},
    "one shot": {"schedule": "one_shot"},
    "lottery ticket": {"rewind": True},
    "rigl": {"start": 0.0, "schedule": "one_shot", "end": 4, "regrow": 0.3, "every": 3, "allocation": "erk"},
    "dense-sparse-dense": {"release": 0.8},
}

every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def pruning(options: dict[str, Any] | None = None, sparsity: float = 0.8) -> WeightPruning:
    return WeightPruning(sparsity, **{**LIFE, **(options or {})})


def masked(module: Task) -> dict[str, tuple[Tensor, Tensor]]:
    found = ((name, weight, companion(module.net, name, "mask")) for name, weight in module.net.named_parameters())
    return {name: (weight, mask) for name, weight, mask in found if mask is not None}


def zeros(module: Task) -> float:
    pairs = masked(module).values()
    return sum(int((weight == 0).sum()) for weight, _ in pairs) / sum(weight.numel() for weight, _ in pairs)


class Watch(L.Callback):
    """After every step: dead weights are zero, until masks are lifted."""

    def __init__(self, lifted: int = EPOCHS) -> None:
        self.lifted = lifted
        self.zeros: list[float] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pairs = masked(pl_module)
        if pairs:
            self.zeros.append(zeros(pl_module))
            self.masks.append({name: mask.clone() for name, (_, mask) in pairs.items()})
            for name, (weight, mask) in pairs.items():
                assert not weight[mask == 0].any() or trainer.current_epoch >= self.lifted, name


@every_variant
def test_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, masks and momenta, from every epoch; so the sparsity is the same, exactly."""
    module = task("residual")
    straight = fit(module, tmp_path / "straight", pruning(options))
    state = module.state_dict()
    assert any(name.endswith("_mask") for name in state)
    for epoch in range(EPOCHS - 1):
        again = task("residual")
        resumed = fit(
            again, tmp_path / str(epoch), pruning(options), ckpt=tmp_path / "straight" / f"epoch={epoch}.ckpt"
        )
        assert again.state_dict().keys() == state.keys()
        for name, value in again.state_dict().items():
            assert torch.equal(value, state[name]), (epoch, name)
        ours, theirs = (run.optimizers[0].state_dict()["state"] for run in (resumed, straight))
        for place, values in theirs.items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(ours[place][k])) for k, v in values.items())


@every_variant
def test_the_dead_stay_dead_and_are_as_many_as_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    module, watch = task("residual"), Watch(4 if "release" in options else EPOCHS)
    before = {name: weight.numel() for name, weight in module.net.named_parameters() if weight.dim() >= 2}
    fit(module, tmp_path, pruning(options), watch, max_epochs=EPOCHS)
    wanted = 0.5 if options.get("pattern") == "2:4" else 0.8
    assert watch.zeros == sorted(watch.zeros) or "release" in options or "regrow" in options
    assert max(watch.zeros) == pytest.approx(wanted, abs=0.02)
    if "release" not in options:
        assert zeros(module) == pytest.approx(wanted, abs=0.02)
    else:
        assert zeros(module) < 0.1
    if not options.get("pattern"):
        assert masked(module).keys() == before.keys()
    for weight, mask in masked(module).values():
        if options.get("pattern") == "2:4":
            groups = weight.detach().movedim(1, -1).reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all()
        if options.get("pattern") == "kernel" and weight.dim() == 4:
            kernels = mask.flatten(2)
            assert torch.equal(kernels.amax(2), kernels.amin(2))


def test_no_optimizer_wakes_a_dead_weight(tmp_path: Path) -> None:
    """Momentum from before the edit, weight decay, clipping, accumulation; and one that moves weights at random."""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.01 * torch.randn_like(parameter))
            return loss

    torch.optim.Noisy = Noisy  # type: ignore[attr-defined]
    try:
        for name, options in {
            "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
            "AdamW": {"lr": 0.01},
            "Noisy": {"lr": 0.1, "momentum": 0.9},
        }.items():
            module, watch = task("residual", optimizer=name, **options), Watch()
            fit(module, tmp_path / name, pruning(), watch, gradient_clip_val=0.5, accumulate_grad_batches=2)
            assert zeros(module) == pytest.approx(0.8, abs=0.02)
    finally:
        del torch.optim.Noisy  # type: ignore[attr-defined]


def test_clipping_does_not_see_gradients_of_dead_weights(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            for weight, mask in masked(pl_module).values():
                assert weight.grad is not None
                norms.append((float(weight.grad[mask == 0].norm()), float(weight.grad[mask != 0].norm())))

    fit(task("residual"), tmp_path, pruning(), Norms())
    assert norms
    assert all(dead == 0 for dead, _ in norms)
    assert any(alive > 0 for _, alive in norms)


def test_the_lottery_ticket_gets_its_first_weights_back(tmp_path: Path) -> None:
    module = task("residual")
    first = {name: weight.detach().clone() for name, weight in module.net.named_parameters()}

    class Look(L.Callback):
        seen = 0

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch in (1, 2, 3) and batch_idx == 0:
                self.seen += 1
                assert not trainer.optimizers[0].state
                for name, (weight, mask) in masked(pl_module).items():
                    assert torch.equal(weight.detach(), first[name] * mask)

    look = Look()
    fit(module, tmp_path, pruning({"rewind": True}), look)
    assert look.seen == 3


def test_rigl_moves_masks_and_keeps_their_number(tmp_path: Path) -> None:
    module, watch = task("residual"), Watch()
    fit(module, tmp_path, pruning(VARIANTS["rigl"]), watch)
    counts = {tuple(int(mask.sum()) for mask in masks.values()) for masks in watch.masks}
    assert len(counts) == 1
    seen = {tuple(torch.cat([mask.flatten() for mask in masks.values()]).tolist()) for masks in watch.masks}
    assert len(seen) > 2


def test_the_artifact_is_small_and_knows_no_masks(tmp_path: Path) -> None:
    module = task("residual")
    dense = artifact_bytes(module.net)
    fit(module, tmp_path, pruning(sparsity=0.95))
    save_compressed(module.net, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a", task("residual").net)
    assert history(loaded) == ()
    assert [type(edit) for edit in history(module.net)] == [Companions]
    state = module.net.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    assert (tmp_path / "a").stat().st_size < 0.2 * dense
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), module.net.eval()(x))


@pytest.mark.parametrize("order", ["weights first", "channels first"])
def test_beside_channel_pruning(order: str, tmp_path: Path) -> None:
    """Masks are cut with their weights; what the refit writes to the dead is taken back."""
    when = (1, 3) if order == "weights first" else (3, 1)
    module, watch = task("residual"), Watch()
    weights = pruning({"start": when[0], "end": when[0], "schedule": "one_shot"}, 0.5)
    channels = ChannelPruning(Budget(macs=0.6), start=when[1], end=when[1], steps=1, samples=32)
    fit(module, tmp_path / "a", weights, channels, watch)
    for name, (weight, mask) in masked(module).items():
        assert weight.shape == mask.shape, name
    assert zeros(module) > 0.4
    again = task("residual")
    fit(
        again,
        tmp_path / "b",
        pruning({"start": when[0], "end": when[0], "schedule": "one_shot"}, 0.5),
        ChannelPruning(Budget(macs=0.6), start=when[1], end=when[1], steps=1, samples=32),
        ckpt=tmp_path / "a" / "epoch=3.ckpt",
    )
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())
    save_compressed(module.net, tmp_path / "c")
    loaded = load_compressed(tmp_path / "c", task("residual").net)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), module.net.eval()(x))


@pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")
def test_layers_are_replaced_before_they_are_pruned_not_after(tmp_path: Path) -> None:
    low_rank: dict[str, Any] = {"samples": 32, "round_to": 1, "steps": 1}
    module = task("residual")
    first = LowRankFactorization(Budget(macs=0.8), start=1, end=1, **low_rank)
    fit(module, tmp_path / "a", first, pruning({"start": 3, "end": 3, "schedule": "one_shot"}))
    assert zeros(module) == pytest.approx(0.8, abs=0.02)
    early = pruning({"start": 1, "end": 1, "schedule": "one_shot"})
    late = LowRankFactorization(Budget(macs=0.8), start=3, end=3, **low_rank)
    with pytest.raises(ValueError, match="pruned or shared"):
        fit(task("residual"), tmp_path / "b", early, late)


def test_another_network_is_left_alone(tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path, pruning({"exclude": ["stem", "head.weight"]}))
    names = masked(module).keys()
    assert names
    assert not any(name.startswith(("stem.", "head.")) for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` must be a share in \[0, 1\), e.g. 0.9, got 1\.0"),
        ({"sparsity": 0.0}, "`sparsity` must be above 0"),
        ({"criterion": "size"}, "`criterion` must be one of magnitude, taylor, movement, snip, grasp, wanda, random"),
        ({"allocation": "even"}, "`allocation` must be one of global, uniform, erk, lamp"),
        ({"criterion": "taylor"}, "`start` must be after 0"),
        ({"criterion": "snip", "start": 1}, "prunes once, before the first step"),
        ({"criterion": "grasp", "steps": 3}, "criterion='grasp' prunes once, before the first step"),
        ({"criterion": "movement", "start": 1, "allocation": "lamp"}, "have signs"),
        ({"criterion": "grasp", "schedule": "one_shot", "allocation": "lamp"}, "have signs"),
        ({"regrow": 0.3, "pattern": "2:4"}, "`regrow` goes with pattern='unstructured'"),
        ({"release": 1}, "`release` must be a fraction"),
        ({"every": 0}, "`every` must be an integer of at least 1"),
        ({"floor": -0.1}, "`floor` must be a share"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightPruning(**arguments)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (WeightPruning(0.5, exclude=["sterm*"]), "'sterm\\*' matches no parameter and no module"),
        (WeightPruning(0.5, pattern="block:7x7"), "WeightPruning finds no weight to work on: .* blocks of 7x7"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(callback: WeightPruning, message: str, tmp_path: Path) -> None:
    module = task("residual")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, tmp_path, callback)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_lightnings_own_pruning_loses_its_masks_where_ours_does_not(tmp_path: Path) -> None:
    """What `ModelPruning` leaves after a resume: the record is in docs/pruning_and_sharing.md."""
    from lightning.pytorch.callbacks import ModelPruning

    def run(folder: Path, ckpt: Path | None = None) -> float:
        module = task("residual")
        theirs = ModelPruning(
            "l1_unstructured", amount=0.5, make_pruning_permanent=True, use_lottery_ticket_hypothesis=False
        )
        running = trainer(folder, theirs, max_epochs=4)
        running.fit(module, data(), data(), ckpt_path=ckpt, weights_only=False)
        weights = [p for name, p in module.net.named_parameters() if p.dim() >= 2]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", tmp_path / "straight" / "epoch=2.ckpt")
    assert straight > 0.9  # half of what is left, every epoch
    assert resumed < straight - 0.2  # the masks of the epochs before are gone

    ours = []
    for ckpt in (None, tmp_path / "ours" / "epoch=2.ckpt"):
        module = task("residual")
        fit(module, tmp_path / ("ours" if ckpt is None else "again"), pruning(sparsity=0.9), ckpt=ckpt)
        ours.append(zeros(module))
    assert ours[0] == ours[1] == pytest.approx(0.9, abs=0.01)


def test_masks_beside_an_average_and_in_bfloat16(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = task("residual")
    fit(module, tmp_path / "a", pruning(), EMAWeightAveraging(decay=0.5))
    assert zeros(module) == pytest.approx(0.8, abs=0.02)
    module = task("residual")
    fit(module, tmp_path / "b", pruning(), precision="bf16-mixed")
    assert zeros(module) == pytest.approx(0.8, abs=0.02)


def test_one_callback_after_a_run_that_failed(tmp_path: Path) -> None:
    """It works on the network that it is given next, and lets go of the other."""

    class Fail(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("as users' code does")

    callback, first = pruning({"schedule": "one_shot"}), task("residual")
    with pytest.raises(RuntimeError, match="as users' code does"):
        fit(first, tmp_path / "a", callback, Fail())
    callback.done = 0.0
    module = task("residual")
    fit(module, tmp_path / "b", callback)
    assert zeros(module) == pytest.approx(0.8, abs=0.02)
    with torch.no_grad():
        for weight, _ in masked(first).values():
            weight.fill_(1.0)
    fit(module, tmp_path / "c", callback)
    assert all(bool((weight == 1).all()) for weight, _ in masked(first).values())


def test_a_network_of_its_own(tmp_path: Path) -> None:
    module = Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)))
    fit(module, tmp_path, pruning({"pattern": "block:4x4"}))
    assert zeros(module) == pytest.approx(0.8, abs=0.03)


class Dropping(Task):
    """Dropout, a log and a dict: all that a step may do on the way to its loss."""

    def __init__(self) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 4)
        )
        super().__init__(net)
        self.calls: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.calls.append(len(batch[0]))
        return {"loss": super().training_step(batch, batch_idx)}


def test_grasp_prunes_by_exact_second_derivatives_and_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Dropping()
    module.net[3].p = 0.0
    weights = {name: p for name, p in module.net.named_parameters() if p.dim() >= 2}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images, labels = next(iter(data(64)))
    loss = nn.functional.cross_entropy(module.net(images), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), list(weights.values()))
    scores = {name: w.detach() * h for (name, w), h in zip(weights.items(), products, strict=True)}
    expected = make_masks(scores, 0.8, Pattern("unstructured"))
    module.load_state_dict(before)
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.random = torch.get_rng_state()

        def after_edits(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            state = pl_module.state_dict()
            assert torch.equal(self.random, torch.get_rng_state())
            assert all(p.grad is None for p in pl_module.parameters())
            assert pl_module.calls == []
            for name, value in before.items():
                alive = state.get(f"{name}_mask", torch.ones(()))
                assert torch.equal(state[name], value.masked_fill(alive == 0, 0.0)), name
            seen.append({name: mask.bool().clone() for name, (_, mask) in masked(pl_module).items()})

    options = {"criterion": "grasp", "start": 0, "end": 0, "schedule": "one_shot", "samples": 64}
    running = trainer(tmp_path, Look(), pruning(options), max_epochs=1)
    running.fit(module, data(64), data(64))
    [masks] = seen
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_grasp_with_dropout_draws_alike_in_both_passes(tmp_path: Path) -> None:
    """Two runs that stand at other random numbers prune the same weights."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        module = Dropping()
        torch.manual_seed(seed)
        options = {"criterion": "grasp", "start": 0, "end": 0, "schedule": "one_shot", "samples": 32}
        fit(module, tmp_path / str(seed), pruning(options), max_epochs=1)
        found.append({name: mask for name, (_, mask) in masked(module).items()})
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_grasp_needs_a_loss_that_is_returned(tmp_path: Path) -> None:
    class Manual(Task):
        automatic_optimization = False

    class Mute(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net(batch[0])

    options = {"criterion": "grasp", "start": 0.0, "schedule": "one_shot"}
    for kind, message in (
        (Manual, "Manual has automatic_optimization=False: use criterion='snip'"),
        (Mute, "got None"),
    ):
        module = kind(task("plain").net)
        with pytest.raises(MisconfigurationException, match=message):
            fit(module, tmp_path, pruning(options))
        assert not masked(module)


@pytest.mark.parametrize(
    ("then", "expected"),
    [({"sparsity": 0.9}, 0.9), ({"sparsity": 0.5}, 0.5), ({"options": {"pattern": "2:4"}}, 0.5)],
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_may_ask_for_something_else(
    epoch: int, then: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    """What is due by now is done at once, the rest when it is due."""
    first, watch, module = task("residual"), Watch(), task("residual")
    fit(first, tmp_path / "a", pruning())
    assert zeros(first) == pytest.approx(0.8, abs=0.02)
    fit(module, tmp_path / "b", pruning(**then), watch, ckpt=tmp_path / f"a/epoch={epoch}.ckpt")
    if "options" in then:
        found = [(w, m) for w, m in masked(module).values() if w.shape[1] % 4 == 0]
        assert all(int((m == 0).sum()) == m.numel() // 2 for _, m in found)
        assert sum(m.numel() for _, m in masked(module).values()) > sum(m.numel() for _, m in found)
    else:
        assert zeros(module) == pytest.approx(expected, abs=0.02)
        assert watch.zeros[-1] == pytest.approx(expected, abs=0.02)
    assert len(watch.zeros) == 4 * (EPOCHS - 1 - epoch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without sparse tensor cores says")
def test_two_four_says_that_this_machine_has_no_kernels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(task("plain"), tmp_path, pruning({"pattern": "2:4"}))
    [said] = [record.message for record in caplog.records if "sparse kernels" in record.message]
    assert said.startswith("WeightPruning: 0 of ")
    assert "cpu has no kernels" in said or "torch has no kernels" in said
