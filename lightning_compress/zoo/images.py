"""Labelled images, in memory or in files, and what is done to them on the way to a network."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler

__all__ = [
    "EpochShuffle",
    "FileImages",
    "ImageSource",
    "MemoryImages",
    "Prepare",
    "Samples",
    "list_images",
    "mix_seeds",
    "read_idx",
    "shift_and_flip",
]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


class ImageSource(Protocol):
    """Labelled images of one size."""

    @property
    def labels(self) -> Tensor:
        """The classes, int64 [N]."""
        ...

    def pixels(self, indices: Tensor) -> Tensor:
        """Images uint8 [len(indices), C, H, W]."""
        ...


@dataclass(frozen=True)
class MemoryImages:
    """Images that are held in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def pixels(self, indices: Tensor) -> Tensor:
        """Images uint8 [len(indices), C, H, W]."""
        return self.images[indices]


@dataclass(frozen=True)
class FileImages:
    """Images that are decoded when asked for: to RGB, cropped to a square about the centre and resized.

    Attributes:
        paths: N files.
        labels: int64 [N].
        size: height and width they are resized to, in pixels.
    """

    paths: Sequence[Path]
    labels: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """What all of them take in memory."""
        return len(self.paths) * 3 * self.size**2

    def pixels(self, indices: Tensor) -> Tensor:
        """Images uint8 [len(indices), C, H, W]."""
        return torch.stack([self._decode(self.paths[index]) for index in indices.tolist()])

    def in_memory(self) -> MemoryImages:
        """All of them, decoded now."""
        images = torch.empty(len(self.paths), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for index, image in enumerate(pool.map(self._decode, self.paths)):
                images[index] = image
        return MemoryImages(images, self.labels)

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:  # PIL's UnidentifiedImageError and truncated files among them
            raise ValueError(f"{path} cannot be read as an image ({error}); replace or delete it") from error
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Prepare:
    """Makes of raw images what a network takes: the size and channels asked for, normalised.

    Attributes:
        channels: 1 or 3; gray images are repeated, coloured ones turned gray.
        size: height and width, in pixels.
        mean: of each channel of the raw images, between 0 and 1.
        std: likewise.

    Example:
        >>> Prepare(channels=3, size=4, mean=(0.5,), std=(0.5,))(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 3, 4, 4])
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """From uint8 [N, C, H, W] to float32 [N, channels, size, size]."""
        x = images.float() / 255
        x = (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.channels < x.shape[1]:
            return x.mean(1, keepdim=True)
        return x.expand(-1, self.channels, -1, -1).contiguous()


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Some of a source's images, prepared; a DataLoader fetches a batch of them at once.

    Args:
        source: where the images are.
        indices: int64 [n], which of them.
        prepare: from uint8 [n, C, H, W] to what the network takes.
    """

    def __init__(self, source: ImageSource, indices: Tensor, prepare: Callable[[Tensor], Tensor]) -> None:
        self.source = source
        self.indices = indices
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: what DataLoader calls where there is such a method, instead of once for each sample."""
        indices = self.indices[batch]
        return self.prepare(self.source.pixels(indices)), self.source.labels[indices]


class EpochShuffle(RandomSampler):
    """An order of the samples for each epoch that depends on seed and epoch alone.

    The order of a RandomSampler depends on everything that drew random numbers before, so that a run resumed from
    a checkpoint would see other batches than the uninterrupted one. Lightning calls `set_epoch` before each epoch.

    Args:
        dataset: what to shuffle.
        seed: a 64-bit integer.
    """

    generator: torch.Generator

    def __init__(self, dataset: Samples, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start the order of an epoch."""
        self.generator.manual_seed(mix_seeds(self.seed, epoch))


def shift_and_flip(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop and mirror images, each by its own draw: the augmentation of He et al. 2015 on CIFAR.

    Args:
        images: [N, C, H, W]; pixels beyond the border are those of the border.
        shift: up to so many pixels in each direction.
        flip: also mirror half of them, left to right.
        generator: where the draws come from, on any device.

    Returns:
        New images of the same shape.
    """
    count, _, height, width = images.shape
    draw = torch.randint(-shift, shift + 1, (count, 2), generator=generator, device=generator.device)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=generator.device) * int(flip)
    draw, mirrored = draw.to(images.device), mirrored.to(images.device)
    rows = (torch.arange(height, device=images.device) + draw[:, :1]).clamp(0, height - 1)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored == 1, columns.flip(1), columns)
    columns = (columns + draw[:, 1:]).clamp(0, width - 1)
    batch = torch.arange(count, device=images.device)[:, None, None]
    picked = images[batch, :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return picked.permute(0, 3, 1, 2).contiguous()


def mix_seeds(*numbers: int) -> int:
    """One well-mixed seed of several integers: neighbouring seeds and epochs share no random numbers."""
    words = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def read_idx(path: Path) -> Tensor:
    """Read a file of the IDX format of MNIST: unsigned bytes, gzipped if its name ends in `.gz`.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        ValueError: the file is damaged, cut off, or of another format.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or was not fully downloaded ({error}); delete it and try again") from error
    # two zero bytes, 8 for 'unsigned byte', the number of dims, their sizes as big-endian 32-bit integers
    header = 4 + 4 * data[3] if len(data) >= 4 else 4
    if data[:3] != b"\x00\x00\x08" or len(data) < header:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes; delete it and try again")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4).tolist())
    if len(data) != header + math.prod(shape):
        raise ValueError(
            f"{path} states {math.prod(shape)} bytes of data and holds {len(data) - header}; delete it and try again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def list_images(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder of classes, sorted.

    Returns:
        For each subfolder that is not hidden, in order, the images in it or deeper.
    """
    return {
        # as strings: comparing paths takes longer than listing them
        path.name: sorted((file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES), key=str)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
