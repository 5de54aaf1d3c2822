"""4x4 sudoku with 4 to 10 holes and one solution. A grid is four lines of four cells, `.` for a hole."""

import random
from functools import cache
from itertools import permutations

from dgemma.tasks.task import Example, Task, dress

FEWEST_HOLES, MOST_HOLES = 4, 10
WORDINGS = ("Solve this sudoku:", "Sudoku:", "Solve the sudoku:", "Fill in this sudoku:", "Complete this grid:")
UNITS = (
    *(tuple(range(4 * row, 4 * row + 4)) for row in range(4)),
    *(tuple(range(column, 16, 4)) for column in range(4)),
    *((corner, corner + 1, corner + 4, corner + 5) for corner in (0, 2, 8, 10)),
)


def valid(cells: str) -> bool:
    """Whether 16 filled cells (row by row) hold 1 to 4 once in each row, column and box."""
    return len(cells) == 16 and all({cells[i] for i in unit} == set("1234") for unit in UNITS)


@cache
def all_grids() -> tuple[str, ...]:
    """All 288 filled grids, each as 16 characters row by row, in lexical order."""
    rows = ["".join(row) for row in permutations("1234")]
    halves = [a + b for a in rows for b in rows if len(set(a[:2] + b[:2])) == 4]  # both boxes are then right
    return tuple(sorted(top + low for top in halves for low in halves if valid(top + low)))


def solutions(puzzle: str) -> int:
    """How many grids agree with the givens of `puzzle` (16 characters, `.` for a hole)."""
    givens = [(i, cell) for i, cell in enumerate(puzzle) if cell != "."]
    return sum(all(grid[i] == cell for i, cell in givens) for grid in all_grids())


def lines(cells: str) -> str:
    """Write 16 cells as four lines."""
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


class Sudoku(Task):
    """Small sudoku puzzles."""

    name = "sudoku"

    def draw(self, rng: random.Random) -> Example:
        holes = rng.randint(FEWEST_HOLES, MOST_HOLES)
        while True:
            grid = rng.choice(all_grids())
            hidden = set(rng.sample(range(16), holes))
            puzzle = "".join("." if i in hidden else cell for i, cell in enumerate(grid))
            if solutions(puzzle) == 1:
                break
        wording = dress(rng, rng.choice(WORDINGS)) + "\n" if rng.random() < 0.9 else ""
        return Example(family=self.name, prompt=wording + lines(puzzle), answer=lines(grid), data={"puzzle": puzzle})

    def key(self, example: Example) -> str:
        return example.data["puzzle"]

    def check(self, example: Example, reply: str) -> bool:
        """Four lines of four digits that form a valid grid and keep the givens."""
        rows = [row.replace(" ", "") for row in reply.strip().split("\n")]
        if [len(row) for row in rows] != [4] * 4:
            return False
        cells = "".join(rows)
        return valid(cells) and all(
            given in (".", cell) for given, cell in zip(example.data["puzzle"], cells, strict=True)
        )
