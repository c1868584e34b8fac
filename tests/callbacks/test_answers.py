"""Distillation from cached outputs: the same run, with each sample taught once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress import Distillation
from lightning_compress.distill.cache import CacheError
from lightning_compress.distill.losses import KD
from tests.contract.runs import data, trainer
from tests.distill.runs import Student, run, teacher


class Counting(nn.Module):
    """A teacher that counts the samples it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.samples = teacher(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.net(x)


def distillation(source: nn.Module, cache: Path | None) -> Distillation:
    return Distillation(source, {"kd": KD()}, cache=cache, metrics=False)


def test_equals_the_run_without_a_cache(tmp_path: Path) -> None:
    """In a fixed order, bit for bit; the second run asks the teacher nothing."""
    plain, cached, again = Student(), Student(), Student()
    run(plain, tmp_path / "plain", distillation(teacher(), None), max_epochs=3)
    first, second = Counting(), Counting()
    run(cached, tmp_path / "cached", distillation(first, tmp_path / "cache"), max_epochs=3)
    run(again, tmp_path / "again", distillation(second, tmp_path / "cache"), max_epochs=3)
    for module in (cached, again):
        for name, value in module.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name]), name
    asked = 64 + 16  # every sample, and the first batch that sizes things up
    assert (first.samples, second.samples) == (asked, 16)


def test_a_shuffled_run_gets_each_sample_its_own_output(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
            seen.append(teacher.clone())
            return super().forward(student, teacher, target)

    class Module(Student):
        inputs: list[Tensor]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.inputs = [*getattr(self, "inputs", []), batch[0].clone()]
            return super().training_step(batch, batch_idx)

    module, source = Module(), teacher()
    callback = Distillation(source, Watching(), cache=tmp_path / "cache", metrics=False)
    loader = DataLoader(data().dataset, batch_size=16, shuffle=True)
    trainer(tmp_path / "run", callback, max_epochs=3).fit(module, loader, data())
    steps = len(module.inputs)
    source.eval()
    with torch.no_grad():
        for x, given in zip(module.inputs[-12:], seen[-12:], strict=True):
            assert torch.allclose(source(x), given, atol=1e-5)
    assert steps >= 12


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        self.clean = data().dataset

    def __len__(self) -> int:
        return len(self.clean)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        x, y = self.clean[index]
        return x + 0.1 * torch.randn_like(x), y


def test_random_augmentation_in_the_data_set_is_refused_before_training(tmp_path: Path) -> None:
    running = trainer(tmp_path / "run", distillation(teacher(), tmp_path / "cache"))
    with pytest.raises(MisconfigurationException, match="augmented randomly"):
        running.fit(Student(), DataLoader(Noisy(), batch_size=16), data())
    assert running.global_step == 0


def test_random_augmentation_in_the_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="augmented randomly"):
        run(Student(mixup=True), tmp_path, distillation(teacher(), tmp_path / "cache"), max_epochs=3)


def test_layers_inside_and_moving_teachers_cannot_be_cached() -> None:
    with pytest.raises(ValueError, match="fixed teacher"):
        Distillation("self", cache="somewhere")
