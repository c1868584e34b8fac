"""What every method owes to every run. A new method adds a row to `methods.py`, nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

from lightning_compress.artifact import load_compressed, save_compressed
from lightning_compress.budget import BudgetError
from lightning_compress.edits import EditError, Replace, apply_edits, companions, history
from lightning_compress.footprint import Footprint, measure
from lightning_compress.methods.quantization import quantization_buffers
from tests.contract.fresh import Fresh
from tests.contract.methods import METHODS, SCHEMES, Method
from tests.contract.nets import ALL, NETS, TIED
from tests.contract.runs import EPOCHS, Metrics, data, fit, task

ROOT = Path(__file__).parents[2]

# 64 images are fewer than a linear layer has unknowns, and the methods say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration samples for:UserWarning")

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_compressing_method = pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if m.budget], ids=[name for name, m in METHODS.items() if m.budget]
)


def _cases(compressing: bool) -> pytest.MarkDecorator:
    """Every method on every feed-forward network, and one of each scheme on networks of the other types."""
    chosen = [name for name, method in METHODS.items() if method.budget or not compressing]
    pairs = [(name, net) for name in chosen for net in (*NETS, *(TIED if name in SCHEMES else ()))]
    return pytest.mark.parametrize(
        ("method", "net"), [(METHODS[name], net) for name, net in pairs], ids=[f"{name}-{net}" for name, net in pairs]
    )


every_case = _cases(compressing=False)
every_compressing_case = _cases(compressing=True)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    with Fresh() as processes:
        yield processes


def footprint(net: torch.nn.Module) -> Footprint:
    return measure(net, torch.zeros(2, 1, 8, 8))


def state(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """All that a run ends with, flat."""
    optimizer = trainer.optimizers[0].state_dict()
    moments = {f"{i}.{k}": v for i, values in optimizer["state"].items() for k, v in values.items()}
    return {**module.state_dict(), **moments}


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), f"{name} differs"


@every_case
def test_resumed_equals_uninterrupted(method: Method, net: str, tmp_path: Path) -> None:
    """From checkpoints taken before, between and after the edits: bit for bit."""
    metrics, module = Metrics(), task(net)
    trainer = fit(module, tmp_path / "straight", *method.make(), metrics)
    assert len(history(module.net)) >= (2 if method.budget else 0)
    for epoch in (0, 1, 3):
        again, resumed = Metrics(), task(net)
        checkpoint = tmp_path / "straight" / f"epoch={epoch}.ckpt"
        second = fit(resumed, tmp_path / f"from{epoch}", *method.make(), again, ckpt=checkpoint)
        assert_identical(state(trainer, module), state(second, resumed))
        assert history(resumed.net) == history(module.net)
        assert again.rows == {e: row for e, row in metrics.rows.items() if e > epoch}


@every_case
def test_best_and_last_are_compressed(method: Method, net: str, tmp_path: Path) -> None:
    module = task(net)
    trainer = fit(module, tmp_path, *method.make())
    final = footprint(module.net)
    for which in ("best", "last"):
        trainer.test(module, data(), ckpt_path=which, verbose=False, weights_only=True)
        assert footprint(module.net).params == final.params
    # A module made anew takes the shape of whatever it is given, the dense epoch included.
    for epoch, macs in ((EPOCHS - 1, final.macs), (0, footprint(ALL[net]()).macs)):
        trainer.test(module, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False, weights_only=True)
        assert footprint(module.net).macs == macs


@every_case
def test_artifact_loads_in_a_fresh_process(method: Method, net: str, fresh: Fresh, tmp_path: Path) -> None:
    module = task(net)
    fit(module, tmp_path, *method.make())
    module.net.eval()
    save_compressed(module.net, tmp_path / "compressed.safetensors")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        y = module.net(x)
    assert torch.equal(load_compressed(tmp_path / "compressed.safetensors", ALL[net]()).eval()(x), y)
    save_file({"x": x, "y": y}, tmp_path / "outputs.safetensors")
    fresh.check(tmp_path, net)


class Watch(L.Callback):
    """After every edit: the optimizer holds the live parameters, no other, with state of their shapes; all move."""

    def __init__(self) -> None:
        self.edits = 0
        self.before: dict[str, torch.Tensor] | None = None

    def after_edits(self, trainer: L.Trainer, pl_module: L.LightningModule, path: str, edits: Any, frozen: Any) -> None:
        self.edits += 1
        optimizer = trainer.optimizers[0]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in pl_module.parameters()}
        assert len(held) == len({id(p) for p in held})
        for p in held:
            assert p.grad is None or p.grad.shape == p.shape
            for value in optimizer.state[p].values():
                assert value.dim() == 0 or value.shape == p.shape
        assert set(optimizer.state) <= set(held)
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.before is not None:
            for name, p in pl_module.named_parameters():
                assert not torch.equal(p, self.before[name]), f"{name} did not move"
            self.before = None


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}),
        ("Adam", {"lr": 0.01, "amsgrad": True}),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
        ("RMSprop", {"lr": 0.001, "momentum": 0.5, "weight_decay": 1e-4}),
    ],
)
@every_compressing_method
def test_optimizer_moves_exactly_the_live_parameters(
    method: Method, optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    watch = Watch()
    fit(task("residual", optimizer=optimizer, **options), tmp_path, *method.make(), watch)
    assert watch.edits >= 2


@every_compressing_case
def test_budget_is_met(method: Method, net: str, tmp_path: Path) -> None:
    """Measured by footprint, within two hundredths of the dense network (or what the row says) from below."""
    module = task(net)
    dense = getattr(footprint(module.net), method.unit)
    fit(module, tmp_path, *method.make())
    reached = getattr(footprint(module.net), method.unit) / dense
    assert method.budget - method.slack < reached <= method.budget


@every_compressing_case
def test_unreachable_budget_is_refused_before_training(method: Method, net: str, tmp_path: Path) -> None:
    module = task(net)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(BudgetError, match=r"lowest reachable .* is [\d,]+"):
        fit(module, tmp_path, *method.make(0.0001))
    assert_identical(before, dict(module.state_dict()))
    assert not list(tmp_path.glob("*.ckpt"))


@every_compressing_case
def test_twice(method: Method, net: str, tmp_path: Path) -> None:
    """The same edits again are refused; the compressed network is compressed again as any other."""
    module = task(net)
    fit(module, tmp_path / "first", *method.make(method.twice))
    edits = history(module.net)
    before = dict(module.state_dict())
    with pytest.raises(EditError, match=r"was it applied before|is quantized"):
        apply_edits(module.net, edits)
    assert_identical(before, dict(module.state_dict()))
    once = getattr(footprint(module.net), method.unit)
    again = task(net)
    again.net = module.net
    if method.last:
        with pytest.raises(MisconfigurationException, match="comes last"):
            fit(again, tmp_path / "second", *method.make(method.twice))
        assert_identical(before, dict(module.state_dict()))
        return
    fit(again, tmp_path / "second", *method.make(method.twice))
    assert getattr(footprint(module.net), method.unit) <= method.twice * once
    assert history(module.net)[: len(edits)] == edits
    save_compressed(module.net, tmp_path / "twice.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_compressed(tmp_path / "twice.safetensors", ALL[net]()).eval()(x), module.net.eval()(x))


@every_case
def test_result_exports_and_keeps_its_names(method: Method, net: str, tmp_path: Path) -> None:
    module = task(net)
    fit(module, tmp_path, *method.make())
    model = module.net.eval()
    beside = {f"{path}.{name}" for path, part in model.named_modules() for name in companions(part)}
    beside |= set(quantization_buffers(model))
    names = [name for name in model.state_dict() if name not in beside]  # masks are for training, and in no artifact
    before = list(ALL[net]().state_dict())
    if method.renames:  # what replaces a layer lives under its name; all else keeps its own
        replaced = {path for edit in history(model) if isinstance(edit, Replace) for path in edit.layers}
        inside = tuple(f"{path}." for path in replaced)
        names, before = ([name for name in all_ if not name.startswith(inside)] for all_ in (names, before))
        assert replaced
    assert names == before
    x = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("names", [tuple(METHODS)[i::4] for i in range(4)], ids="-".join)
def test_two_processes_agree(names: tuple[str, ...], tmp_path: Path) -> None:
    """DDP over gloo: the same edits, and the same weights at the end."""
    for name in names:
        (tmp_path / name).mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.contract.ddp", str(tmp_path), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        a, b = (torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert a["edits"] == b["edits"], name
        assert len(a["edits"]) >= (2 if METHODS[name].budget else 0), name
        assert_identical(a["weights"], b["weights"])
