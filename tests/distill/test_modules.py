"""The LightningModules of distillation: on the callback's engine, and students that teach each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress import Distillation
from lightning_compress.distill import Term
from lightning_compress.distill.losses import DIST, KD, FitNet
from lightning_compress.distill.module import DistillationModule
from lightning_compress.distill.mutual import MutualModule
from tests.contract.nets import NETS
from tests.contract.runs import data
from tests.distill.runs import Student, run, teacher

ADAM = partial(torch.optim.Adam, lr=0.01)
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)


def student(net: str = "plain") -> nn.Module:
    torch.manual_seed(1)
    return NETS[net]()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_module_is_the_callback(tmp_path: Path) -> None:
    losses = {"kd": Term(KD(temperature=3.0), weight=0.7), "hint": Term(FitNet(), student="body", teacher="b")}
    module = DistillationModule(student(), teacher(), losses, task_weight=0.3, optimizer=ADAM, scheduler=COSINE)
    trainer = run(module, tmp_path / "module", monitor=None)
    assert {"val/acc", "distill/kd", "distill/val_agreement"} <= trainer.callback_metrics.keys()
    by_callback = Student()
    run(by_callback, tmp_path / "callback", Distillation(teacher(), losses, task_weight=0.3))
    assert same(module.student, by_callback.net)
    exported = module.export()
    assert type(exported) is NETS["plain"]
    assert not exported.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in exported.modules())
    assert same(exported, module.student)
    stored = torch.load(tmp_path / "module" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {f"student.{name}" for name in student().state_dict()}


def test_the_module_resumes_bit_for_bit(tmp_path: Path) -> None:
    def make() -> DistillationModule:
        losses = {"kd": KD(), "hint": Term(FitNet(), student="body", teacher="b")}
        return DistillationModule(student(), teacher(), losses, optimizer=ADAM, scheduler=COSINE)

    straight, resumed = make(), make()
    run(straight, tmp_path / "straight", max_epochs=4, monitor=None)
    run(resumed, tmp_path / "resumed", ckpt=tmp_path / "straight" / "epoch=1.ckpt", max_epochs=4, monitor=None)
    assert same(straight, resumed)


def test_mutual_learning_equals_hand_written(tmp_path: Path) -> None:
    class Hand(MutualModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            a, b = (net(x) for net in self.students.values())
            p, q = (F.log_softmax(z, dim=-1) for z in (a, b))
            kl = partial(F.kl_div, log_target=True, reduction="batchmean")
            return F.cross_entropy(a, y) + kl(p, q.detach()) + F.cross_entropy(b, y) + kl(q, p.detach())

    ours, hand = (kind([student(), student("residual")], optimizer=ADAM) for kind in (MutualModule, Hand))
    trainer = run(ours, tmp_path / "ours", monitor=None)
    run(hand, tmp_path / "hand", monitor=None)
    for a, b in zip(ours.parameters(), hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert {"val/acc_0", "val/acc_1"} <= trainer.callback_metrics.keys()
    assert same(ours.export("1"), ours.students["1"])


def test_three_students_and_another_loss(tmp_path: Path) -> None:
    nets = {"a": student(), "b": student("residual"), "c": student("depthwise")}
    module = MutualModule(nets, {"dist": DIST()}, optimizer=ADAM)
    before = [p.clone() for p in module.parameters()]
    trainer = run(module, tmp_path, monitor=None)
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert trainer.validate(module, data(), verbose=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MutualModule([student()]), "at least two students, got 1"),
        (lambda: MutualModule([student(), student()], Term(FitNet(), student="body")), "not from layers inside"),
        (lambda: MutualModule([student(), student()]).export("2"), "no student '2'; there are 0, 1"),
    ],
)
def test_misuse_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
