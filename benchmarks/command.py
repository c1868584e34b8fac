"""The command line of a benchmark as its JSON file has it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = ["command"]


def command() -> str:
    """The command that runs now; folders that only this machine has are called FOLDER."""
    arguments = ("FOLDER" if Path(argument).is_absolute() else argument for argument in sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
