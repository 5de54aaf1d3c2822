"""Small tasks with exact verifiers: what the demo model is trained on and what decoding is scored with.

Pure Python and the standard library only.
"""

import random
from collections.abc import Mapping
from itertools import repeat

from dgemma.tasks.calendar import Calendar
from dgemma.tasks.records import Records
from dgemma.tasks.smalltalk import Smalltalk
from dgemma.tasks.sorting import Sorting
from dgemma.tasks.stories import Stories
from dgemma.tasks.sudoku import Sudoku
from dgemma.tasks.sums import Sums
from dgemma.tasks.task import Example, Task

FAMILIES: dict[str, Task] = {
    task.name: task for task in (Sums(), Sorting(), Sudoku(), Records(), Calendar(), Stories(), Smalltalk())
}

# Shares of the text that the demo's tokenizer is made from. Training has shares of its own, see `train.recipes`.
WEIGHTS: dict[str, float] = {
    "sums": 0.25,
    "sorting": 0.15,
    "sudoku": 0.22,
    "records": 0.12,
    "calendar": 0.08,
    "stories": 0.13,
    "smalltalk": 0.05,
}

__all__ = ["FAMILIES", "WEIGHTS", "Example", "Task", "held_out", "mixture"]


def mixture(rng: random.Random, shares: Mapping[str, float] = WEIGHTS) -> Example:
    """Draw one training example, its family by `shares`."""
    (name,) = rng.choices(tuple(shares), tuple(shares.values()))
    return FAMILIES[name].sample(rng)


def held_out(name: str, n: int, seed: int) -> list[Example]:
    """`n` examples of the family `name` whose problems are never trained on; the same for the same seed.

    Small families (calendar, smalltalk) have few held-out problems, so theirs recur in other wordings.
    """
    if name not in FAMILIES:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(FAMILIES)}")
    rng = random.Random(f"held out {name} {seed}")
    return [FAMILIES[name].sample(rng, held_out=True) for _ in repeat(None, n)]
