"""The distillation callback: equal to a step written by hand, and gone without a trace."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress import Budget, ChannelPruning, Distillation, save_compressed
from lightning_compress.distill import DistillationError, EarlyExit, Teacher, Term
from lightning_compress.distill.losses import DKD, KD, FitNet
from tests.contract.nets import NETS
from tests.contract.runs import data
from tests.distill.runs import Student, run, teacher, weights

ROOT = Path(__file__).parents[2]


def by_callback(source: Any = None, **options: Any) -> Distillation:
    return Distillation(
        teacher() if source is None else source,
        {"kd": Term(KD(temperature=3.0), weight=0.7)},
        task_weight=0.3,
        **options,
    )


def difference(a: nn.Module, b: nn.Module) -> float:
    left, right = ({k.replace("_orig_mod.", ""): v for k, v in m.state_dict().items()} for m in (a, b))
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dict output, clipping": ({"dict": True}, {"gradient_clip_val": 0.1}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "accumulation": ({}, {"accumulate_grad_batches": 4}),
    "manual optimization": ({"manual": True}, {}),
    "mixup": ({"mixup": True}, {}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize(("module", "trainer"), CASES.values(), ids=CASES.keys())
def test_equals_hand_written(module: dict[str, Any], trainer: dict[str, Any], tmp_path: Path) -> None:
    ours, hand = Student(**module), Student(_as(teacher(), trainer), **module)
    start = weights(ours)
    run(hand, tmp_path / "hand", **trainer)
    callback = by_callback()
    run(ours, tmp_path / "ours", callback, **trainer)
    assert difference(ours, hand) == 0.0
    assert any(not torch.equal(value, start[name].to(value.dtype)) for name, value in ours.state_dict().items())
    alone = Student(**module)
    run(alone, tmp_path / "alone", **trainer)
    assert difference(ours, alone) > 0  # the teacher makes a difference


def _as(net: nn.Module, trainer: dict[str, Any]) -> nn.Module:
    return net.to(torch.bfloat16) if trainer.get("precision") == "bf16-true" else net


def test_equals_hand_written_when_compiled(tmp_path: Path) -> None:
    ours, hand = Student(compile=True), Student(teacher(), compile=True)
    run(hand, tmp_path / "hand")
    run(ours, tmp_path / "ours", by_callback())
    assert difference(ours, hand) <= 1e-6


def test_equals_hand_written_in_two_processes_and_projectors_agree(tmp_path: Path) -> None:
    kinds = ("callback", "hand", "projected")
    for kind in kinds:
        (tmp_path / kind).mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.distill.ddp", str(tmp_path), *kinds]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, hand, projected = (
        [torch.load(tmp_path / kind / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)] for kind in kinds
    )
    for mine, theirs in zip(ours, hand, strict=True):
        for name, value in mine["weights"].items():
            assert torch.equal(value, theirs["weights"][name]), name
    a, b = projected
    assert len(a["held"]) > len([n for n in a["weights"] if "running" not in n and "num_batches" not in n])
    for x, y in zip(a["held"], b["held"], strict=True):
        assert torch.equal(x, y)


def test_leaves_no_trace(tmp_path: Path) -> None:
    """Module, teacher and optimizer are as they would be without the callback; the checkpoint holds the student."""
    module, source = Student(), teacher()
    before = weights(source)
    modes = [m.training for m in source.modules()]
    trainer = run(module, tmp_path, by_callback(source))
    assert "training_step" not in vars(module)
    assert [m.training for m in source.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert all(p.grad is None for p in source.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (module, source) for m in net.modules())
    module.trainer = None
    pickle.dumps(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    plain = Student()
    run(plain, tmp_path / "plain")
    ours, theirs = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path, tmp_path / "plain"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    sizes = [(f / "last.ckpt").stat().st_size for f in (tmp_path, tmp_path / "plain")]
    assert abs(sizes[0] - sizes[1]) < 4096
    Student.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)


PROJECTED = {"kd": KD(), "fitnet": Term(FitNet(), weight=0.5, student="body", teacher="b")}


def test_checkpoint_holds_projectors_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight = Student()
    a = run(straight, tmp_path / "straight", Distillation(teacher(), PROJECTED), max_epochs=4)
    checkpoint = tmp_path / "straight" / "epoch=1.ckpt"
    resumed = Student()
    b = run(resumed, tmp_path / "resumed", Distillation(teacher(), PROJECTED), ckpt=checkpoint, max_epochs=4)
    assert difference(straight, resumed) == 0.0
    moments = [t.optimizers[0].state_dict()["state"] for t in (a, b)]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(value, moments[1][index][name])
    loaded = torch.load(checkpoint, weights_only=True)
    [state] = [v for k, v in loaded["callbacks"].items() if "Distillation" in k]
    [projector] = state["projectors"].values()
    size = sum(v.numel() for v in projector["state"].values())
    assert size == 24 * 32 + 32 or size == 24 * 32
    count = sum(p.numel() for p in straight.parameters()) + size
    tensors = [v for values in loaded["optimizer_states"][0]["state"].values() for v in values.values() if v.dim()]
    assert sum(v.numel() for v in tensors) == 2 * count


def test_projectors_learn(tmp_path: Path) -> None:
    class Look(L.Callback):
        values: list[Tensor]

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.values = [*getattr(self, "values", []), trainer.optimizers[0].param_groups[0]["params"][-1].clone()]

    look = Look()
    run(Student(), tmp_path, Distillation(teacher(), PROJECTED), look)
    assert not torch.equal(look.values[0], look.values[-1])


def test_each_term_is_logged(tmp_path: Path) -> None:
    trainer = run(Student(), tmp_path, Distillation(teacher(), PROJECTED))
    names = {name for name in trainer.callback_metrics if name.startswith("distill/")}
    assert names == {
        *(f"distill/{n}" for n in ("task", "kd", "fitnet")),
        *(f"distill/val_{n}" for n in ("agreement", "kl", "student_ece", "teacher_ece")),
    }
    assert trainer.callback_metrics["distill/task"] > 0


def test_several_teachers_are_weighted(tmp_path: Path) -> None:
    """A teacher and its copy, at any weights, are that teacher."""
    one, two = Student(), Student()
    run(one, tmp_path / "one", by_callback())
    run(two, tmp_path / "two", by_callback([Teacher(teacher(), weight=3.0), Teacher(teacher(), weight=1.0)]))
    assert difference(one, two) < 1e-4


@pytest.mark.parametrize("kind", ["state dict", "lightning", "artifact", "compressed lightning"])
def test_teacher_from_a_file(kind: str, tmp_path: Path) -> None:
    source = teacher()
    path = tmp_path / ("teacher.safetensors" if kind == "artifact" else "teacher.ckpt")
    if kind == "state dict":
        torch.save(source.state_dict(), path)
    elif kind == "artifact":
        save_compressed(source, path)
    elif kind == "lightning":
        torch.save({"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}, "epoch": 1}, path)
    else:
        pruned = Student(net="residual")
        run(pruned, tmp_path / "teacher", ChannelPruning(Budget(macs=0.5), samples=16))
        path, source = tmp_path / "teacher" / "last.ckpt", pruned.net
    ours, loaded = Student(), Student()
    run(ours, tmp_path / "a", by_callback(source))
    run(loaded, tmp_path / "b", by_callback(Teacher(path, net=NETS["residual"]())))
    assert difference(ours, loaded) == 0.0


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True, "precision": "bf16"}])
def test_teacher_runs_otherwise_than_the_step(options: dict[str, Any], tmp_path: Path) -> None:
    source = teacher()
    ours, plain = Student(), Student()
    run(ours, tmp_path / "a", by_callback(Teacher(source, **options)))
    run(plain, tmp_path / "b", by_callback(source))
    assert next(source.parameters()).dtype == torch.float32
    assert 0 < difference(ours, plain) < 0.2


def test_self_teaches_after_the_first_edit(tmp_path: Path) -> None:
    module = Student(net="residual")
    callbacks = [
        Distillation("self", PROJECTED_SELF),
        ChannelPruning(Budget(macs=0.5), start=1, end=1, steps=1, samples=16),
    ]
    trainer = run(module, tmp_path, *callbacks, max_epochs=3)
    assert trainer.callback_metrics["distill/val_agreement"] > 0.25
    [file] = tmp_path.glob("teacher-*.safetensors")
    checkpoint = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert file.stat().st_size > 0
    assert sum(v.numel() for v in checkpoint["state_dict"].values()) == sum(
        v.numel() for v in module.state_dict().values()
    )
    file.unlink()
    with pytest.raises(MisconfigurationException, match=r"teacher-.*is not beside the checkpoint"):
        run(Student(net="residual"), tmp_path / "again", *callbacks, ckpt=tmp_path / "epoch=1.ckpt", max_epochs=4)


PROJECTED_SELF = {"kd": KD(), "fitnet": Term(FitNet(), student="a")}


# Faults: each names the thing.


class Twice(Student):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.net(batch[0])
        return super().training_step(batch, batch_idx)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sequence, self.head = nn.Linear(8, 6), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sequence(x[:, 0]).flatten(1))


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 4), torch.nan)


def classes(count: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, count))


FAULTS: dict[str, tuple[Any, str]] = {
    "missing file": (lambda: Distillation("nowhere/teacher.ckpt"), r"no file nowhere/teacher\.ckpt"),
    "class count": (lambda: Distillation(classes(7)), r"student's output is \(16, 4\), the teacher's \(16, 7\)"),
    "student's layer": (
        lambda: Distillation(teacher(), Term(FitNet(), student="bodi", teacher="b")),
        r"student has no layer 'bodi'; near names: body",
    ),
    "teacher's layer": (
        lambda: Distillation(teacher(), Term(FitNet(), student="body", teacher="stemm")),
        r"teacher has no layer 'stemm'; near names: stem",
    ),
    "shapes": (lambda: Distillation(Tokens(), Term(FitNet(), student="body", teacher="sequence")), r"losses\.fitnet"),
    "NaN": (lambda: Distillation(NotANumber()), r"teacher NotANumber gives NaN"),
    "labels": (lambda: Distillation(teacher(), DKD(), target=0), r"losses dkd need class labels"),
    "self alone": (lambda: Distillation("self"), r"no callback of this run makes edits"),
}


@pytest.mark.parametrize(("make", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_thing(make: Any, message: str, tmp_path: Path) -> None:
    module = Student()
    before = weights(module)
    with pytest.raises((FileNotFoundError, DistillationError, MisconfigurationException), match=message):
        run(module, tmp_path, make())
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_student_that_runs_twice(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="student 'net' ran twice in one training step"):
        run(Twice(), tmp_path, by_callback())


def test_teacher_file_of_another_network(tmp_path: Path) -> None:
    torch.save(NETS["depthwise"]().state_dict(), tmp_path / "other.ckpt")
    with pytest.raises(DistillationError, match=r"not of this Plain.*give Teacher\(path, net=\.\.\.\)"):
        run(Student(), tmp_path, by_callback(tmp_path / "other.ckpt"))


def test_teacher_inside_the_module_is_refused(tmp_path: Path) -> None:
    module = Student()
    module.mentor = teacher()
    with pytest.raises(MisconfigurationException, match="submodule of Student"):
        run(module, tmp_path, by_callback(module.mentor, student="net"))


def test_validation_and_test_work_as_before(tmp_path: Path) -> None:
    module = Student()
    trainer = run(module, tmp_path, by_callback())
    assert trainer.test(module, data(), ckpt_path="best", verbose=False, weights_only=True)


EXITS = {
    "exit": Term(EarlyExit(), student=["a", "b"], teacher=""),
    "hint": Term(FitNet(), weight=0.1, student="a", teacher="b"),
}


def test_early_exits_learn_from_the_output_and_stay_behind(tmp_path: Path) -> None:
    straight, resumed, alone = (Student(net="residual") for _ in range(3))
    trainer = run(straight, tmp_path / "straight", Distillation("exits", EXITS), max_epochs=4)
    assert {"distill/exit", "distill/hint", "distill/task"} <= trainer.callback_metrics.keys()
    run(
        resumed,
        tmp_path / "resumed",
        Distillation("exits", EXITS),
        ckpt=tmp_path / "straight" / "epoch=1.ckpt",
        max_epochs=4,
    )
    assert difference(straight, resumed) == 0.0
    run(alone, tmp_path / "alone", max_epochs=4)
    assert difference(straight, alone) > 0
    assert straight.state_dict().keys() == alone.state_dict().keys()


def test_an_exit_does_not_teach_the_output(tmp_path: Path) -> None:
    """All gradients of an exit's term end at its layer and before it."""
    module = Student(net="residual")
    before = weights(module)
    run(
        module,
        tmp_path,
        Distillation("exits", {"exit": Term(EarlyExit(alpha=1.0), student="a", teacher="")}, task_weight=0.0),
    )
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("net.stem", "net.a")) for name in moved)


def test_layers_inside_a_compiled_student(tmp_path: Path) -> None:
    compiled, plain = Student(compile=True), Student()
    for module in (compiled, plain):
        run(module, tmp_path / str(module is plain), Distillation(teacher(), PROJECTED))
    assert difference(compiled, plain) < 1e-4


def test_a_compiled_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled, plain = Student(), Student()
    run(compiled, tmp_path / "compiled", Distillation(Teacher(teacher(), compile=True), PROJECTED))
    run(plain, tmp_path / "plain", Distillation(teacher(), PROJECTED))
    assert difference(compiled, plain) < 1e-4


def test_one_callback_serves_one_run_after_the_other(tmp_path: Path) -> None:
    callback, fresh = Distillation(teacher(), PROJECTED), Distillation(teacher(), PROJECTED)
    first, second, third = Student(), Student(), Student()
    run(first, tmp_path / "first", callback)
    run(second, tmp_path / "second", callback)
    run(third, tmp_path / "third", fresh)
    assert difference(second, third) == 0.0


def test_the_module_itself_is_the_student(tmp_path: Path) -> None:
    class Whole(Student):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    whole, alone = Whole(), Whole()
    run(whole, tmp_path / "whole", by_callback())
    run(alone, tmp_path / "alone")
    assert difference(whole, alone) > 0


def test_a_student_of_which_only_parts_are_called(tmp_path: Path) -> None:
    class Parts(Student):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            features = self.net.body(batch[0]).flatten(1)
            return nn.functional.cross_entropy(self.net.head(torch.relu(self.net.hidden(features))), batch[1])

    with pytest.raises(DistillationError, match=r"'net' is not called as a whole .* only its 'body' is"):
        run(Parts(), tmp_path, by_callback())
