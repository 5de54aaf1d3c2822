"""What a task is: a seeded source of examples with an exact verifier.

A task draws a problem, words it as a request and writes one right reply. `check` decides whether *any* reply is
right from the problem itself (`Example.data`), so tasks with many right replies are scored fairly.

Training and held-out problems are disjoint by construction: a problem is held out when a stable hash of its
content (never of its wording) falls in one of sixteen parts.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HELD_OUT_PARTS = 16  # one problem in this many is never trained on
MAX_DRAWS = 100_000


@dataclass(frozen=True, kw_only=True)
class Example:
    """One request and one right reply; `data` holds the problem as plain values for the verifier."""

    family: str
    prompt: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A family of problems. Subclasses give `name`, `draw`, `key` and `check`."""

    name: str
    scored: bool = True  # False: trained and shown, but not a family that results are reported for
    open: bool = False  # whether a prompt has many right replies

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """Draw any example, whichever side of the split it falls on."""

    @abstractmethod
    def key(self, example: Example) -> str | None:
        """The canonical content of the problem, or None for one that is always in the training part."""

    @abstractmethod
    def check(self, example: Example, reply: str) -> bool:
        """Whether `reply` (outer whitespace aside) solves the problem in `example.data`."""

    def is_held_out(self, example: Example) -> bool:
        """Whether the problem belongs to the held-out part."""
        key = self.key(example)
        if key is None:
            return False
        digest = hashlib.sha256(f"{self.name}:{key}".encode()).digest()
        return digest[0] % HELD_OUT_PARTS == 0

    def sample(self, rng: random.Random, held_out: bool = False) -> Example:
        """Draw an example from the training part, or from the held-out part."""
        for _ in range(MAX_DRAWS):
            example = self.draw(rng)
            if self.is_held_out(example) == held_out:
                return example
        raise AssertionError(f"{self.name}: no example with held_out={held_out} in {MAX_DRAWS} draws")


def dress(rng: random.Random, request: str) -> str:
    """Vary the surface of a request a little: case of its first letter, a "please", its last mark."""
    roll = rng.random()
    if roll < 0.08:
        request = "Please " + request[0].lower() + request[1:]
    elif roll < 0.2:
        request = request[0].lower() + request[1:]
    if request[-1] in ".?!" and rng.random() < 0.15:
        request = request[:-1]
    return request


def words(text: str) -> list[str]:
    """The words of `text`, to write long word lists compactly."""
    return text.split()
