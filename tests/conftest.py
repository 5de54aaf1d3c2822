"""Fixtures of the whole suite: small checkpoints, built and loaded once a session (once a worker under xdist)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Read when torch starts: tiny networks lose time on threads, and sums in one order are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite started in the background inherits an ignored Ctrl-C, and so would the commands that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))  # `import tiny`, whatever pytest's import mode

if TYPE_CHECKING:
    from tiny import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Checkpoints by spec name, dgemma's networks and transformers' models of them."""
    import torch

    from tiny import Lab

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Lab(tmp_path_factory.mktemp("checkpoints"))
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(lab: Lab) -> Path:
    """Directory of one small random checkpoint without tokenizer, for tests that need any model at all."""
    return lab.path("base")
