"""Processes that know of an artifact and nothing of its training.

One is started and imports what reads artifacts; each check is a fork of it. A process of its own for each would import
torch every time, which takes longer than the check.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightning_compress.artifact import load_compressed
from tests.contract.nets import ALL

ROOT = Path(__file__).parents[2]


class Fresh:
    """A context in which artifacts are checked by processes without training code."""

    def __enter__(self) -> Fresh:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.contract.fresh"]
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def check(self, folder: Path, net: str) -> None:
        """The artifact in a folder gives the outputs stored beside it, to the bit."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), net]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer == '"right"\n', json.loads(answer or '"the process ended"')


def refuse(*_: Any, **__: Any) -> None:
    """What stands for everything that unpickles."""
    raise AssertionError("pickle")


def load(folder: Path, net: str) -> None:
    """Load, compute, compare."""
    model = load_compressed(folder / "compressed.safetensors", ALL[net]()).eval()
    stored = load_file(folder / "outputs.safetensors")
    assert torch.equal(model(stored["x"]), stored["y"]), "outputs differ"
    assert not {"lightning", "lightning_compress.callbacks"} & set(sys.modules), "training code was imported"


def serve() -> None:
    """Answer each line of the input, a folder and a network, by a fork."""
    torch.load = refuse
    pickle.load = pickle.loads = pickle.Unpickler = refuse  # type: ignore[assignment,misc]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer = "right"
            try:
                folder, net = json.loads(line)
                load(Path(folder), net)
            except Exception:  # noqa: BLE001 - whatever it is, the test says it
                answer = traceback.format_exc()
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.stdout.write(json.dumps(f"the process ended with status {status}") + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
