"""Kernels for GPUs, on a CPU: Triton's interpreter is chosen before Triton is loaded. `PRETEND_CARD=1` runs the tests
there as if there were a card, to see that nothing stays on the host that a card's kernels would want.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]  # Triton is for Linux


@pytest.fixture(autouse=True)
def pretended_card() -> Iterator[None]:
    """A card around each test, if that is asked for."""
    if os.environ.get("PRETEND_CARD") != "1":
        yield
        return
    from pretend_card import pretended

    with pretended(computes=True):
        yield
