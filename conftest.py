"""What holds for every test: one thread, one seed, no account, no network."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is loaded, and for the processes that tests start: small networks are fastest on one thread, and the
# tests themselves run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hypothesis import settings

# A change passes or fails for what it is: property tests draw the same examples each time, unless new ones are asked
# for by `make fuzz`, which looks for faults nobody has seen yet.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("fuzz", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# What trains, exports or starts processes of its own: right, and not what one waits for after each line.
LONG = (
    *("app", "callbacks", "contract", "distill/test_cache.py", "methods/test_mixed_precision.py"),
    *("test_docs.py", "test_export.py", "test_export_floats.py", "test_matrix.py", "test_wheel.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out."""
    tests = Path(__file__).parent / "tests"
    for item in items:
        if any(item.path.is_relative_to(tests / name) for name in LONG):
            item.add_marker("long")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever ran before it."""
    torch.manual_seed(0)
