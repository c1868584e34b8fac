"""Distillation over two processes, by the callback or by hand, one run after another in the same ones.

`python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distill.ddp FOLDER KIND ...`
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_compress import Distillation
from lightning_compress.distill import Term
from lightning_compress.distill.losses import KD, FitNet
from tests.distill.runs import Student, run, teacher


def main(kind: str, folder: Path) -> None:
    callbacks = []
    if kind != "hand":
        losses = {"kd": Term(KD(temperature=3.0), weight=0.7)}
        if kind == "projected":
            losses["fitnet"] = Term(FitNet(), student="body", teacher="b")
        callbacks = [Distillation(teacher(), losses, task_weight=0.3)]
    module = Student(teacher() if kind == "hand" else None)
    trainer = run(module, folder, *callbacks, devices=2, strategy="ddp")
    optimizer = trainer.optimizers[0]
    held = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    torch.save({"weights": module.state_dict(), "held": held}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    for kind in sys.argv[2:]:
        main(kind, Path(sys.argv[1]) / kind)
