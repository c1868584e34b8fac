"""scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsData(L.LightningDataModule):
    """Images [1, 8, 8] between 0 and 1; 1,297 to train on, 200 to validate, 300 to test."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
        samples = TensorDataset(images, torch.from_numpy(labels))
        self.train, self.val, self.test = random_split(samples, [1297, 200, 300], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 256)
