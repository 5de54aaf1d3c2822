"""Sort 4 to 10 single letters, or 4 to 9 whole numbers below 100, smallest first."""

import random
import re
import string

from dgemma.tasks.task import Example, Task, dress

LETTER_WORDINGS = (
    "Sort these letters: {items}",
    "Sort {items}",
    "Put these letters in order: {items}",
    "Put {items} in alphabetical order.",
    "Order the letters {items}.",
    "Arrange these letters from a to z: {items}",
    "Sort alphabetically: {items}",
    "Can you sort {items}?",
)
NUMBER_WORDINGS = (
    "Sort these numbers: {items}",
    "Sort {items}",
    "Put {items} in order.",
    "Put these numbers in order: {items}",
    "Order the numbers {items}.",
    "Arrange from smallest to largest: {items}",
    "Sort from low to high: {items}",
    "Can you sort {items}?",
)


class Sorting(Task):
    """Letters are answered with spaces between them, numbers with commas."""

    name = "sorting"

    def draw(self, rng: random.Random) -> Example:
        data: dict[str, tuple[str, ...] | tuple[int, ...]]
        if rng.random() < 0.5:
            letters = rng.choices(string.ascii_lowercase, k=rng.randint(4, 10))
            shown = (" " if rng.random() < 0.75 else ", ").join(letters)
            wording, answer = rng.choice(LETTER_WORDINGS), " ".join(sorted(letters))
            data = {"items": tuple(letters)}
        else:
            numbers = [rng.randrange(100) for _ in range(rng.randint(4, 9))]
            shown = (", " if rng.random() < 0.75 else " ").join(map(str, numbers))
            wording, answer = rng.choice(NUMBER_WORDINGS), ", ".join(map(str, sorted(numbers)))
            data = {"items": tuple(numbers)}
        prompt = dress(rng, wording.format(items=shown))
        return Example(family=self.name, prompt=prompt, answer=answer, data=data)

    def key(self, example: Example) -> str:
        return " ".join(map(str, sorted(example.data["items"])))  # a reordering is the same problem

    def check(self, example: Example, reply: str) -> bool:
        """The reply is the items in order, with spaces or commas between them and nothing else."""
        wanted = [str(item) for item in sorted(example.data["items"])]
        return re.split(r", ?| ", reply.strip()) == wanted
