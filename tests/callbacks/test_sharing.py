"""Weights that share values: few of them after every step, through checkpoints, beside other methods, in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress import Budget, ChannelPruning, Distillation, WeightPruning, WeightSharing
from lightning_compress.artifact import artifact_bytes, load_compressed, save_compressed
from lightning_compress.budget import BudgetError
from lightning_compress.edits import companion, history
from tests.contract.runs import EPOCHS, Task, fit, task

VARIANTS: dict[str, dict[str, Any]] = {
    "five bits": {"bits": 5},
    "by pattern": {"bits": {"head*": 2, "*": 3}},
    "sum": {"bits": 4, "gradient": "sum", "clustering": "linear"},
    "groups": {"bits": 2, "groups": 4},
    "budget": {"bits": None, "budget": Budget(bytes=0.2), "samples": 32},
}


def sharing(options: dict[str, Any] | None = None, start: int = 2) -> WeightSharing:
    return WeightSharing(**{"bits": 3, "start": start, **(options or {})})


def shared(module: Task) -> dict[str, tuple[Tensor, Tensor]]:
    found = ((name, weight, companion(module.net, name, "code")) for name, weight in module.net.named_parameters())
    return {name: (weight, code) for name, weight, code in found if code is not None}


def check(module: Task, values: int = 8) -> None:
    found = shared(module)
    assert found
    for name, (weight, code) in found.items():
        distinct = weight.detach().unique()
        assert len(distinct[distinct != 0]) <= values, name
        assert torch.equal(code == 0, weight == 0), name
        for place in code.unique():
            assert len(weight[code == place].unique()) == 1, name


class Watch(L.Callback):
    """After every step weights of a cluster are the same."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if shared(pl_module):
            check(pl_module, 256)
            self.values.append(float(next(iter(shared(pl_module).values()))[0].abs().sum()))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    module, watch = task("residual"), Watch()
    fit(module, tmp_path / "straight", sharing(options), watch)
    assert len(set(watch.values)) > 3  # values are trained
    state = module.state_dict()
    for epoch in range(EPOCHS - 1):
        again = task("residual")
        ckpt = tmp_path / "straight" / f"epoch={epoch}.ckpt"
        fit(again, tmp_path / str(epoch), sharing(options), ckpt=ckpt)
        assert again.state_dict().keys() == state.keys()
        for name, value in again.state_dict().items():
            assert torch.equal(value, state[name]), (epoch, name)


def test_patterns_say_how_many_bits(tmp_path: Path) -> None:
    module = task("residual")
    fit(module, tmp_path, sharing({"bits": {"head*": 2, "stem": 3}}))
    counts = {name: int(code.max()) for name, (_, code) in shared(module).items()}
    assert counts
    assert all(name.startswith(("head", "stem")) for name in counts)
    assert all(count <= (4 if name.startswith("head") else 8) for name, count in counts.items())


def test_momenta_and_optimizers_follow(tmp_path: Path) -> None:
    for name, options in {"SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "AdamW": {"lr": 0.01}}.items():
        module = task("residual", optimizer=name, **options)
        running = fit(module, tmp_path / name, sharing(), Watch(), gradient_clip_val=0.5, accumulate_grad_batches=2)
        for weight, code in shared(module).values():
            for value in running.optimizers[0].state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    for place in code.unique():
                        members = value[code == place]
                        assert torch.allclose(members, members[0].expand_as(members), atol=1e-6)


def test_the_gradient_of_a_value_is_the_sum_over_its_weights(tmp_path: Path) -> None:
    """One step of plain SGD on shared weights is one on the codebook itself."""
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    class Look(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            found = shared(pl_module)
            if found:
                weight, code = found["head.weight"]
                assert weight.grad is not None
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                seen.append((weight.detach().clone(), weight.grad.clone(), code, rate))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if seen:
                before, gradient, code, rate = seen[-1]
                after = shared(pl_module)["head.weight"][0]
                for place in range(1, int(code.max()) + 1):
                    here = code == place
                    step = rate * gradient[here].sum()
                    assert torch.allclose(after[here], before[here] - step, atol=1e-6)

    fit(task("residual", optimizer="SGD", lr=0.01), tmp_path, sharing({"gradient": "sum"}), Look())
    assert seen


def test_pruned_shared_and_coded(tmp_path: Path) -> None:
    """Deep Compression in one run: zeros stay, and the file is what it says."""
    module = task("residual")
    dense = artifact_bytes(module.net)
    pruning = WeightPruning(0.8, start=0, end=1, steps=2, floor=0.0)
    fit(module, tmp_path, pruning, sharing({"bits": 4}, start=3), Distillation("self"))
    check(module, 16)
    weights = [weight for weight, _ in shared(module).values()]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.8, abs=0.02)
    save_compressed(module.net, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 0.15 * dense
    loaded = load_compressed(tmp_path / "a", task("residual").net)
    assert history(loaded) == ()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(x), module.net.eval()(x))


@pytest.mark.parametrize("first", ["sharing", "channels"])
def test_beside_channel_pruning(first: str, tmp_path: Path) -> None:
    when = (1, 3) if first == "sharing" else (3, 1)
    module = task("residual")
    channels = ChannelPruning(Budget(macs=0.6), start=when[1], end=when[1], steps=1, samples=32)
    fit(module, tmp_path, sharing(start=when[0]), channels, Watch())
    for name, (weight, code) in shared(module).items():
        assert weight.shape == code.shape, name
    check(module)


def test_a_budget_of_bytes_is_met_by_the_file(tmp_path: Path) -> None:
    module = task("residual")
    dense = artifact_bytes(module.net, coded=False)
    fit(module, tmp_path, sharing({"bits": None, "budget": Budget(bytes=0.2), "samples": 32}))
    save_compressed(module.net, tmp_path / "a")
    assert 0.15 * dense < (tmp_path / "a").stat().st_size <= 0.2 * dense
    assert len({int(code.max()) for _, code in shared(module).values()}) > 1


def test_a_budget_that_cannot_be_met_is_refused_before_training(tmp_path: Path) -> None:
    module = task("residual")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(BudgetError, match="cannot be met"):
        fit(module, tmp_path, sharing({"bits": None, "budget": Budget(bytes=0.01)}))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "`bits` must be from 1 to 8, got 0"),
        ({"bits": {"*": 12}}, "`bits` must be from 1 to 8, got 12"),
        ({"bits": None}, "give either `bits` or `budget`"),
        ({"bits": 4, "budget": Budget(bytes=0.1)}, "give either `bits` or `budget`"),
        ({"bits": None, "budget": Budget(macs=0.1)}, "`budget` must be a Budget of bytes alone"),
        ({"clustering": "best"}, "`clustering` must be one of exact, linear, density, random"),
        ({"gradient": "max"}, "`gradient` must be mean or sum"),
        ({"groups": 0}, "`groups` must be an integer of at least 1"),
        ({"samples": 0}, "`samples` must be an integer of at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSharing(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["sterm"]}, "'sterm' matches no parameter and no module"),
        ({"bits": {"sterm": 3}}, "'sterm' matches no parameter and no module"),
        ({"exclude": ["*"]}, "WeightSharing finds no weight to work on"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(task("residual"), tmp_path, sharing(options))
