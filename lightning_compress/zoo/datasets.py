"""The data sets: where their images come from. Digits need no download, the others look before they download."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from lightning_compress.extras import require_extra
from lightning_compress.zoo.datamodule import ImageDataModule, Split
from lightning_compress.zoo.images import FileImages, ImageSource, MemoryImages, list_images, read_idx

__all__ = ["CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "ImageDataModule", "ImageFolder"]


class Digits(ImageDataModule):
    """1,797 handwritten digits, 8 x 8, 17 gray levels, that come with scikit-learn: no download.

    Alpaydin and Kaynak, 'Optical recognition of handwritten digits', UCI, 1998. A fifth of them, chosen by
    `split_seed`, is the test set. Arguments as `ImageDataModule`; `root` is not needed.

    Example:
        >>> data = Digits(batch_size=32)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    title = "digits"
    native_channels = 1
    native_classes = 10
    native_size = 8
    mean = (0.3053,)
    std = (0.3760,)
    mirror = False
    test_fraction: ClassVar[float] = 0.2

    def read(self, split: Split) -> MemoryImages | None:
        """See `ImageDataModule.read`."""
        if split == "val":
            return None
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
        train, test = self._divide(len(labels), self.test_fraction)
        chosen = test if split == "test" else train
        return MemoryImages(images[chosen], torch.from_numpy(labels).long()[chosen])


class FashionMNIST(ImageDataModule):
    """60,000 + 10,000 gray images of clothes, 28 x 28.

    Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747). Arguments as `ImageDataModule`. The four files are looked for
    in `root`, in `root/FashionMNIST/raw` (where torchvision puts them) and where Debian's package
    `dataset-fashion-mnist` does; found nowhere, torchvision downloads them to `root`.

    Example:
        >>> data = FashionMNIST("data", batch_size=64)
        >>> data.num_classes, data.image_size
        (10, 28)
    """

    title = "Fashion-MNIST"
    native_channels = 1
    native_classes = 10
    native_size = 28
    mean = (0.2860,)
    std = (0.3530,)
    debian: ClassVar[Path] = Path("/usr/share/datasets/fashion-mnist")
    files: ClassVar[tuple[str, ...]] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def prepare_data(self) -> None:
        """Download the files if they are nowhere.

        Raises:
            FileNotFoundError: a folder holds some of the files and not all.
            ConnectionError: the download failed.
        """
        if self._find() is None:
            _download(self, "FashionMNIST", "install Debian's package dataset-fashion-mnist")

    def read(self, split: Split) -> MemoryImages | None:
        """See `ImageDataModule.read`."""
        if split == "val":
            return None
        files = self._find()
        if files is None:
            raise FileNotFoundError(
                f"{self.title} is neither in {self.root} nor in {self.debian}: prepare_data() first"
            )
        images, labels = (read_idx(file) for file in (files[:2] if split == "train" else files[2:]))
        if images.shape != (len(labels), 28, 28) or labels.dim() != 1:
            raise ValueError(
                f"{self.title} in {files[0].parent}: expected images [N, 28, 28] and labels [N] of the {split} set, "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
        return MemoryImages(images[:, None], labels.long())

    def _find(self) -> list[Path] | None:
        for folder in (self.root, self.root / "FashionMNIST" / "raw", self.debian):
            found = {
                name: path for name in self.files for path in (folder / name, folder / f"{name}.gz") if path.is_file()
            }
            if len(found) == len(self.files):
                return [found[name] for name in self.files]
            if found:
                missing = ", ".join(f"{name}.gz" for name in self.files if name not in found)
                raise FileNotFoundError(f"{folder} holds part of {self.title}; add {missing}, or delete the others")
        return None


class CIFAR10(ImageDataModule):
    """50,000 + 10,000 colour images of 10 classes, 32 x 32, read and downloaded by torchvision.

    Krizhevsky, 'Learning multiple layers of features from tiny images', 2009. Arguments as `ImageDataModule`;
    `root` holds torchvision's `cifar-10-batches-py`.

    Example:
        >>> data = CIFAR10("data", augment=True)
        >>> data.num_classes, data.in_channels, data.image_size
        (10, 3, 32)
    """

    title = "CIFAR10"
    native_channels = 3
    native_classes: ClassVar[int | None] = 10
    native_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def prepare_data(self) -> None:
        """Download the files if they are not in `root`, or damaged.

        Raises:
            ConnectionError: the download failed.
        """
        _download(
            self, self.title, "unpack its archive 'for Python' there; a folder of images goes by data=image_folder"
        )

    def read(self, split: Split) -> MemoryImages | None:
        """See `ImageDataModule.read`."""
        if split == "val":
            return None
        data = getattr(require_extra("torchvision.datasets", "vision"), self.title)(self.root, train=split == "train")
        return MemoryImages(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))


class CIFAR100(CIFAR10):
    """50,000 + 10,000 colour images of 100 classes, 32 x 32; otherwise as `CIFAR10`, in `cifar-100-python`.

    Example:
        >>> CIFAR100("data").num_classes
        100
    """

    title = "CIFAR100"
    native_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)


class ImageFolder(ImageDataModule):
    """Images in folders: `root/train/<class>/`, `root/test/<class>/` and, if there is one, `root/val/<class>/`.

    Arguments as `ImageDataModule`; images are cropped to squares about their centre and resized to `image_size`.
    They are decoded once where they fit into `memory_limit`, else for each batch (give it `num_workers` then).

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         Path(folder, name).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8)).save(Path(folder, name, "0.png"))
        ...     ImageFolder(folder, image_size=8).num_classes
        2
    """

    title = "the image folder"
    native_channels = 3
    native_classes = None
    native_size = 32
    mean = (0.485, 0.456, 0.406)  # ImageNet's, which pretrained networks expect
    std = (0.229, 0.224, 0.225)
    memory_limit: ClassVar[int] = 2**30  # bytes of each split

    def prepare_data(self) -> None:
        """Check the folders.

        Raises:
            FileNotFoundError: one is missing, or has no images.
            ValueError: the classes are not those expected.
        """
        for split in ("train", "val", "test"):
            if split != "val" or (self.root / split).is_dir():
                self._list(split)

    def read(self, split: Split) -> ImageSource | None:
        """See `ImageDataModule.read`."""
        if split == "val" and not (self.root / split).is_dir():
            return None
        classes = self._list(split)
        paths = [path for files in classes.values() for path in files]
        labels = torch.tensor([label for label, files in enumerate(classes.values()) for _ in files])
        images = FileImages(paths, labels, self.image_size)
        return images.in_memory() if images.nbytes <= self.memory_limit else images

    def _count_classes(self) -> int:
        return len(self._classes("train"))

    def _classes(self, split: str) -> dict[str, list[Path]]:
        folder = self.root / split
        classes = list_images(folder) if folder.is_dir() else {}
        if not classes:
            raise FileNotFoundError(
                f"expected images in {folder}/<class>/, found no such folder; set `root` (data.root)"
            )
        if empty := [name for name, files in classes.items() if not files]:
            raise FileNotFoundError(f"no images in {', '.join(str(folder / name) for name in empty)}")
        return classes

    def _list(self, split: str) -> dict[str, list[Path]]:
        classes, expected = self._classes(split), list(self._classes("train"))
        if list(classes) != expected:
            odd = sorted(set(classes) ^ set(expected))
            raise ValueError(f"{self.root}: `train` and `{split}` differ in their classes: {', '.join(odd)}")
        if len(classes) != self.num_classes:
            raise ValueError(f"`num_classes` is {self.num_classes}, but {self.root} has {len(classes)} classes")
        return classes


def _download(data: ImageDataModule, name: str, instead: str) -> None:
    try:
        datasets = require_extra("torchvision.datasets", "vision")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{data.title} is not in {data.root.absolute()}, and without torchvision it cannot be downloaded: {error}; "
            f"or {instead}",
            name=error.name,
        ) from error
    try:
        getattr(datasets, name)(data.root, download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision tried every mirror, or a checksum is wrong
        raise ConnectionError(
            f"{data.title} is not in {data.root.absolute()} and could not be downloaded ({error}); where there is no "
            f"network, copy it there (`root`, or data.root=...), or {instead}"
        ) from error
