"""Runs over two processes; each rank leaves what it ended with.

`python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.contract.ddp FOLDER METHOD ...`. One after
another in the same processes: to start them and import torch takes longer than a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_compress.edits import edits_to_json, history
from tests.contract.methods import METHODS
from tests.contract.runs import fit, task


def main(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    module = task("residual")
    trainer = fit(module, folder, *METHODS[name].make(), devices=2, strategy="ddp")
    # Buffers are each rank's own in DDP, but for the broadcast before each step; parameters must agree.
    weights = {key: value.detach() for key, value in module.named_parameters()}
    record = {"edits": edits_to_json(history(module.net)), "weights": weights}
    torch.save(record, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    for method in sys.argv[2:]:
        main(method, Path(sys.argv[1]) / method)
