"""What a run that is resumed remembers of its pruned weights: Lightning's `ModelPruning` and `WeightPruning`.

    python benchmarks/resumed_masks.py

A small residual network is trained for four epochs, uninterrupted and from the checkpoint of an earlier one; the table
has the share of its weights that are zero at the end.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_free_nets import marked_table
from lightning_compress import WeightPruning
from tests.contract.runs import data, task, trainer

EPOCHS = 4
RESUMED = (3, 2)  # after so many epochs
SIDES: dict[str, Callable[[], L.Callback]] = {
    "Lightning ModelPruning, half of what is left each epoch": lambda: ModelPruning(
        "l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False
    ),
    "WeightPruning(0.9)": lambda: WeightPruning(0.9, start=1, end=3, steps=3),
    "WeightPruning(0.9, rewind=True)": lambda: WeightPruning(0.9, start=1, end=3, steps=3, rewind=True),
    "WeightPruning(0.9), RigL": lambda: WeightPruning(
        0.9, "random", allocation="erk", start=0.0, end=3, schedule="one_shot", regrow=0.3, every=3
    ),
}


def zeros(make: Callable[[], L.Callback], folder: Path, ckpt: Path | None) -> float:
    """Train, and count."""
    module = task("residual")
    running = trainer(folder, make(), max_epochs=EPOCHS)
    running.fit(module, data(), data(), ckpt_path=ckpt, weights_only=False)  # ModelPruning's state needs pickle
    weights = [weight for _, weight in module.net.named_parameters() if weight.dim() >= 2]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def main() -> None:
    """Run from the command line."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = marked_table("", "uninterrupted", *(f"resumed after {epochs} epochs" for epochs in RESUMED))
    for name, make in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            straight = Path(folder, "straight")
            starts = {straight: None, **{Path(folder, str(n)): straight / f"epoch={n - 1}.ckpt" for n in RESUMED}}
            found = [zeros(make, place, ckpt) for place, ckpt in starts.items()]
        table.add_row(name, *(f"{100 * share:.3f} %" for share in found))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
