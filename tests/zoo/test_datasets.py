"""The data sets: what they give, how they split, and what they say where something is missing or damaged."""

from __future__ import annotations

import gzip
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_compress.zoo import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageDataModule, ImageFolder, LeNet300100
from lightning_compress.zoo.images import EpochShuffle, Prepare, list_images, mix_seeds, read_idx, shift_and_flip
from lightning_compress.zoo.tasks import ImageClassifier

SHARED = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def ready(data: ImageDataModule, *stages: str) -> ImageDataModule:
    data.prepare_data()
    for stage in stages or ("fit", "test"):
        data.setup(stage)
    return data


def everything(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    data = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion(folder: Path, train: int = 40, test: int = 12, suffix: str = ".gz") -> None:
    """Files as those of Fashion-MNIST: the i-th image of a set is filled with i, its label is i mod 10."""
    for prefix, count in (("train", train), ("t10k", test)):
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)


def write_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> None:
    """Images in one colour for each class, of odd sizes and formats."""
    for split, count in splits.items():
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            colour = tuple(255 if channel == number else 0 for channel in range(3))
            for index in range(count):
                image = Image.new("RGB", (20 + index, 16), colour)
                image.save(folder / f"{index}{('.png', '.jpg', '.JPEG')[index % 3]}")


@pytest.fixture
def no_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "debian", tmp_path / "not installed")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


class TestDigits:
    def test_batches(self) -> None:
        data = ready(Digits(batch_size=64))
        images, labels = next(iter(data.train_dataloader()))
        assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
        assert (labels.shape, labels.dtype) == ((64,), torch.int64)
        assert (data.in_channels, data.num_classes, data.image_size) == (1, 10, 8)

    def test_the_splits_are_disjoint_and_make_the_whole(self) -> None:
        data = ready(Digits())
        parts = [data._samples[split] for split in ("train", "val", "test")]
        # train and val index into the same four fifths; the test set has a source of its own
        train, val = (set(part.indices.tolist()) for part in parts[:2])
        assert train.isdisjoint(val)
        assert (len(train), len(val), len(parts[2])) == (1294, 144, 359)
        seen = torch.cat([part.source.pixels(part.indices).flatten(1) for part in parts])
        from sklearn.datasets import load_digits

        whole = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8)
        assert torch.equal(seen.unique(dim=0, return_counts=True)[1], whole.unique(dim=0, return_counts=True)[1])
        assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, whole.numpy()))

    def test_the_split_depends_on_its_own_seed_alone(self) -> None:
        def split(**arguments: Any) -> list[Tensor]:
            data = ready(Digits(**arguments))
            return [everything(data.val_dataloader())[0], everything(data.test_dataloader())[0]]

        first = split()
        torch.manual_seed(1)
        assert all(map(torch.equal, first, split(batch_size=7, limit_train=10, augment=True)))
        assert not any(map(torch.equal, first, split(split_seed=1)))

    def test_normalised_by_figures_of_the_data_set(self) -> None:
        data = ready(Digits())
        images = torch.cat([everything(data.val_dataloader())[0], everything(data.test_dataloader())[0]])
        assert images.mean().item() == pytest.approx(0.0, abs=0.03)
        assert images.std().item() == pytest.approx(1.0, abs=0.03)

    def test_limit_train_takes_the_same_samples_each_time(self) -> None:
        few, more = (ready(Digits(limit_train=n))._samples["train"].indices for n in (50, 100))
        assert torch.equal(few, more[:50])
        with pytest.raises(ValueError, match="`limit_train` is 2000, but digits has 1294"):
            Digits(limit_train=2000).setup("fit")

    def test_an_incomplete_batch_is_left_out_of_training_only(self) -> None:
        data = ready(Digits(batch_size=100))
        assert [len(labels) for _, labels in data.train_dataloader()] == [100] * 12
        assert [len(labels) for _, labels in data.val_dataloader()] == [100, 44]
        [(_, labels)] = ready(Digits(batch_size=100, limit_train=30)).train_dataloader()
        assert len(labels) == 30

    def test_the_test_set_is_not_read_before_testing(self) -> None:
        class Watched(Digits):
            asked: list[str] = []  # noqa: RUF012

            def read(self, split: Any) -> Any:
                self.asked.append(split)
                return super().read(split)

        data = Watched(batch_size=32, limit_train=64)
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        task = ImageClassifier(LeNet300100(image_size=8), 10)
        trainer.fit(task, data)
        trainer.validate(task, data, verbose=False)
        assert data.asked == ["train", "val"]
        trainer.test(task, data, verbose=False)
        assert data.asked == ["train", "val", "test"]

    def test_other_sizes_and_channels(self) -> None:
        data, gray = ready(Digits(image_size=32, in_channels=3)), ready(Digits())
        large, small = everything(data.val_dataloader())[0], everything(gray.val_dataloader())[0]
        assert large.shape == (144, 3, 32, 32)
        assert torch.equal(large[:, 0], large[:, 2])
        assert large.mean((2, 3))[:, 0] == pytest.approx(small.mean((1, 2, 3)), abs=0.1)

    def test_workers_give_the_same_batches(self) -> None:
        def batches(workers: int) -> Tensor:
            torch.manual_seed(5)
            return everything(ready(Digits(limit_train=300, num_workers=workers)).train_dataloader())[0]

        assert torch.equal(batches(0), batches(1))


class TestFashionMNIST:
    @pytest.mark.parametrize(("folder", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", "")])
    def test_found_in_root(self, tmp_path: Path, folder: str, suffix: str) -> None:
        write_fashion(tmp_path / folder, suffix=suffix)
        data = ready(FashionMNIST(tmp_path, batch_size=6, val_fraction=0.25))
        assert len(everything(data.train_dataloader())[1]) == 30
        assert len(everything(data.val_dataloader())[1]) == 10
        images, labels = everything(data.test_dataloader())
        assert images.shape == (12, 1, 28, 28)
        assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert (images[:, 0, 0, 0] * 0.3530 + 0.2860).mul(255).round().tolist() == list(range(12))

    def test_found_where_debian_puts_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_fashion(tmp_path / "debian")
        monkeypatch.setattr(FashionMNIST, "debian", tmp_path / "debian")
        data = ready(FashionMNIST(tmp_path / "elsewhere", batch_size=12))
        assert len(everything(data.test_dataloader())[1]) == 12
        assert not (tmp_path / "elsewhere").exists()

    @pytest.mark.skipif(
        not FashionMNIST.debian.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
    )
    def test_the_real_one(self, tmp_path: Path) -> None:
        data = ready(FashionMNIST(tmp_path))
        assert [len(data._samples[split]) for split in ("train", "val", "test")] == [54_000, 6_000, 10_000]
        images, labels = everything(data.test_dataloader())
        assert labels.bincount().tolist() == [1000] * 10
        assert images.mean().item() == pytest.approx(0, abs=0.01)
        assert images.std().item() == pytest.approx(1, abs=0.01)

    @pytest.mark.usefixtures("no_debian", "no_network")
    def test_nowhere_and_no_network(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConnectionError, match=r"Fashion-MNIST is not in .*install Debian's package dataset-fashion"
        ):
            FashionMNIST(tmp_path).prepare_data()
        with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) first"):
            FashionMNIST(tmp_path).setup("fit")

    @pytest.mark.usefixtures("no_debian")
    def test_nowhere_and_no_torchvision(self, tmp_path: Path, uninstall: Callable[[str], None]) -> None:
        uninstall("torchvision")
        with pytest.raises(ModuleNotFoundError, match=r"is not in .*\[vision\]\".*install Debian's package"):
            FashionMNIST(tmp_path).prepare_data()

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds part of Fashion-MNIST; add train-labels-idx1-ubyte.gz, or"):
            FashionMNIST(tmp_path).prepare_data()

    def test_a_partial_download_is_named(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        file = tmp_path / "train-images-idx3-ubyte.gz"
        file.write_bytes(file.read_bytes()[:-20])
        data = FashionMNIST(tmp_path)
        data.prepare_data()
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged or was not fully downloaded"):
            data.setup("fit")

    def test_files_that_do_not_belong_together(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(39))
        with pytest.raises(ValueError, match=r"got \[40, 28, 28\] and \[39\]"):
            FashionMNIST(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01....", "not an IDX file"),
        (b"\x00\x00\x08\x02\x00\x00", "not an IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x09123", "states 9 bytes of data and holds 3"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


class TestCIFAR:
    @pytest.mark.parametrize(("module", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
    def test_batches(
        self, module: type[CIFAR10], classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[dict[str, Any]] = []

        def stored(root: Path, train: bool = True, download: bool = False) -> SimpleNamespace:
            calls.append({"root": root, "train": train, "download": download})
            count = 40 if train else 20
            pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            return SimpleNamespace(data=pixels, targets=[index % classes for index in range(count)])

        monkeypatch.setattr(f"torchvision.datasets.{module.__name__}", stored)
        data = ready(module(tmp_path, batch_size=4))
        images, labels = everything(data.test_dataloader())
        assert images.shape == (20, 3, 32, 32)
        assert labels.tolist() == [index % classes for index in range(20)]
        assert data.num_classes == classes
        red = stored(tmp_path, train=False).data[7, :, :, 0]
        torch.testing.assert_close(images[7, 0] * module.std[0] + module.mean[0], torch.from_numpy(red) / 255)
        assert [call["download"] for call in calls[:3]] == [True, False, False]

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize("module", [CIFAR10, CIFAR100])
    def test_no_network(self, module: type[CIFAR10], tmp_path: Path) -> None:
        with pytest.raises(ConnectionError, match=rf"{module.__name__} is not in .*data.root=.*data=image_folder"):
            module(tmp_path).prepare_data()


class TestImageFolder:
    def test_the_three_splits(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 4, "val": 2, "test": 3})
        data = ready(ImageFolder(tmp_path, batch_size=5, image_size=8))
        assert data.num_classes == 3
        assert [len(data._samples[split]) for split in ("train", "val", "test")] == [12, 6, 9]
        images, labels = everything(data.test_dataloader())
        assert images.shape == (9, 3, 8, 8)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert images.mean((2, 3)).argmax(1).tolist() == labels.tolist()  # each class has a colour

    def test_validation_is_cut_off_where_there_is_none(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 10, "test": 1})
        data = ready(ImageFolder(tmp_path, val_fraction=0.2))
        train, val = (set(data._samples[split].indices.tolist()) for split in ("train", "val"))
        assert (len(train), len(val)) == (24, 6)
        assert train.isdisjoint(val)

    def test_large_sets_are_decoded_batch_by_batch_to_the_same_images(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_folder(tmp_path, {"train": 3, "test": 3})
        at_once = everything(ready(ImageFolder(tmp_path)).test_dataloader())[0]
        monkeypatch.setattr(ImageFolder, "memory_limit", 0)
        data = ready(ImageFolder(tmp_path))
        assert not hasattr(data._samples["test"].source, "images")
        assert torch.equal(at_once, everything(data.test_dataloader())[0])

    def test_gray(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 2, "test": 2})
        gray, colour = (everything(ready(ImageFolder(tmp_path, in_channels=n)).test_dataloader())[0] for n in (1, 3))
        assert gray.shape == (6, 1, 32, 32)
        torch.testing.assert_close(gray, colour.mean(1, keepdim=True))

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected images in .*train/<class>/.*data.root"):
            ImageFolder(tmp_path / "nowhere")
        write_folder(tmp_path, {"train": 1})
        with pytest.raises(FileNotFoundError, match=r"expected images in .*test/<class>/"):
            ImageFolder(tmp_path).prepare_data()
        write_folder(tmp_path, {"test": 1}, classes=("ant", "bee", "cow"))
        with pytest.raises(ValueError, match="`train` and `test` differ in their classes: cat, cow"):
            ImageFolder(tmp_path).prepare_data()
        (tmp_path / "train" / "ant" / "0.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"no images in .*train/ant"):
            ImageFolder(tmp_path)

    def test_another_number_of_classes_than_expected(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 1, "test": 1})
        with pytest.raises(ValueError, match=r"`num_classes` is 10, but .* has 3 classes"):
            ImageFolder(tmp_path, num_classes=10).prepare_data()

    def test_a_damaged_image_is_named(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 2, "test": 1})
        (tmp_path / "train" / "bee" / "1.jpg").write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=r"bee/1.jpg cannot be read as an image"):
            ImageFolder(tmp_path).setup("fit")

    def test_hidden_folders_and_other_files_are_left_alone(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": 1})
        (tmp_path / "train" / ".cache").mkdir()
        (tmp_path / "train" / "ant" / "notes.txt").write_text("")
        assert {name: len(files) for name, files in list_images(tmp_path / "train").items()} == {
            "ant": 1,
            "bee": 1,
            "cat": 1,
        }

    @pytest.mark.skipif(not SHARED.is_file(), reason="the JPEG copy of CIFAR-10 is not beside the checkout")
    @pytest.mark.slow
    def test_the_jpeg_copy_of_cifar10(self, tmp_path: Path) -> None:
        with tarfile.open(SHARED) as archive:
            archive.extractall(tmp_path, filter="data")
        data = ready(ImageFolder(tmp_path, num_classes=10))
        assert [len(data._samples[split]) for split in ("train", "val", "test")] == [45_000, 5_000, 10_000]
        images, labels = everything(data.test_dataloader())
        assert images.shape == (10_000, 3, 32, 32)
        assert labels.bincount().tolist() == [1000] * 10


class TestAugmentation:
    def test_shifts_and_mirrors_each_image_by_its_own_draw(self) -> None:
        image = torch.arange(64.0).view(1, 1, 8, 8)
        out = shift_and_flip(image.repeat(200, 1, 1, 1), 1, True, torch.Generator().manual_seed(0))
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")
        shifted = [padded[0, :, row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
        possible = {tuple(each.flatten().tolist()) for one in shifted for each in (one, one.flip(2))}
        assert {tuple(each.flatten().tolist()) for each in out} == possible

    def test_no_mirror_no_shift_is_the_image_itself(self) -> None:
        images = torch.randn(5, 3, 6, 7)
        assert torch.equal(shift_and_flip(images, 0, False, torch.Generator()), images)

    def test_channels_move_together(self) -> None:
        images = torch.randn(16, 1, 8, 8).expand(-1, 3, -1, -1)
        out = shift_and_flip(images, 2, True, torch.Generator().manual_seed(1))
        assert torch.equal(out[:, 0], out[:, 2])
        assert not torch.equal(out, images)

    def test_only_training_batches_and_the_same_ones_in_a_repeated_run(self) -> None:
        def batches(augment: bool, seed: int) -> dict[str, Tensor]:
            seen: dict[str, list[Tensor]] = {"train": [], "val": []}

            class Watch(ImageClassifier):
                def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
                    seen["train"].append(batch[0])
                    return super().training_step(batch, batch_idx)

                def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                    seen["val"].append(batch[0])

            L.seed_everything(seed, verbose=False)
            trainer = L.Trainer(
                max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            data = Digits(augment=augment, batch_size=64, limit_train=128)
            trainer.fit(Watch(LeNet300100(image_size=8), 10), data)
            return {split: torch.cat(images) for split, images in seen.items()}

        plain, first, again, other = batches(False, 0), batches(True, 0), batches(True, 0), batches(True, 1)
        assert torch.equal(first["train"], again["train"])
        assert not torch.equal(first["train"], other["train"])
        assert not torch.equal(first["train"], plain["train"])
        assert torch.equal(first["val"], plain["val"])
        # the shuffling is not touched by the augmentation: only the pixels differ, most by one pixel's shift
        assert first["train"].shape == plain["train"].shape == (256, 1, 8, 8)
        assert (first["train"] - plain["train"])[:, :, 2:6, 2:6].flatten(1).any(1).float().mean() > 0.8


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    samples = ready(Digits())._samples["train"]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochShuffle(samples, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(0, 0)) == list(range(len(samples)))
    assert len({mix_seeds(*pair) for pair in ((0, 1), (1, 0), (1, 1), (-1, 0), (2**63, 5))}) == 5


def test_prepare_takes_colour_to_gray_and_keeps_the_scale() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    out = Prepare(1, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(images)
    torch.testing.assert_close(out, torch.full((2, 1, 4, 4), 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 7}, "`num_classes` is 7, but digits has 10 classes"),
        ({"in_channels": 2}, "`in_channels` must be 1 or 3, got 2"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"limit_train": 0}, "`limit_train` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"val_fraction": 1}, "`val_fraction` must be between 0 and 1, got 1"),
    ],
)
def test_misuse_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**cast(Any, arguments))
