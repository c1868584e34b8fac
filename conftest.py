"""What holds for every test: one thread, one seed, no account, no network."""

from __future__ import annotations

import os

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


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever ran before it."""
    torch.manual_seed(0)
