"""Triton compiles every kernel without a card, as a step of the 26B launches it: for cards of each kind, old and new,
large and small, AMD's too. What the interpreter runs is also what the compiler takes, and fits the card.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CARDS = {
    "90": "H100",
    "80": "A100",
    "89": "RTX 4090",
    "100": "B200",
    "120": "RTX 5090",
    "gfx942": "MI300X",
    "gfx1201": "Radeon RX 9070",
}
CASES = [
    ("90", "fp8", "one", "commit", "eight", "token"),
    ("90", "int4", "one", "eight"),
    ("90", "bfloat16", "one", "eight"),
    ("90", "int8", "one", "eight"),
    ("90", "nvfp4", "one"),
    ("90", "float32", "one"),
    ("80", "int4", "one"),
    ("89", "fp8", "eight"),
    ("100", "fp8", "one"),
    ("120", "nvfp4", "eight"),
    ("gfx942", "int4", "eight"),
    ("gfx1201", "int8", "one"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{CARDS[case[0]]}-{case[1]}")
def test_compiles(case: tuple[str, ...]) -> None:
    """To machine code, within the card's shared memory, its numbers in registers, and products on tensor cores."""
    command = [sys.executable, str(Path(__file__).with_name("absent.py")), *case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert int(done.stdout.split()[-2]) > 20
