"""A run over two processes; each rank leaves what it ended with. `python -m tests.contract.ddp METHOD FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_compress.edits import edits_to_json, history
from tests.contract.methods import METHODS
from tests.contract.runs import fit, task


def main(name: str, folder: Path) -> None:
    module = task("residual")
    trainer = fit(module, folder, *METHODS[name].make(), devices=2, strategy="ddp")
    # Buffers are each rank's own in DDP, but for the broadcast before each step; parameters must agree.
    weights = {key: value.detach() for key, value in module.named_parameters()}
    record = {"edits": edits_to_json(history(module.net)), "weights": weights}
    torch.save(record, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
