"""Addition and subtraction of whole numbers up to 999, with the working shown column by column.

The working is written ones first and has the same shape for every problem of a given width, so each part of it
can be computed from a few digits nearby:

- addition, ``347 + 285``: ``7+5=12, 4+8+1=13, 3+2+1=06. 347 + 285 = 632``. A column's sum is always written with two
  digits; the first is the carry, and it is the third term of the next column.
- subtraction, ``512 - 77``: ``12-7=5, 11-7-1=3, 05-0-1=4. 512 - 77 = 435``. A column's top is always written with two
  digits; the first is the ten that was borrowed (0 or 1), and it is the third term of the next column.
"""

import random
import re

from dgemma.tasks.task import Example, Task, dress

LARGEST = 999

ADD_WORDINGS = (
    "What is {a} + {b}?",
    "{a}+{b}",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "Compute {a} + {b}",
    "What is the sum of {a} and {b}?",
    "Calculate {a} plus {b}.",
    "What do {a} and {b} make together?",
)
SUBTRACT_WORDINGS = (
    "What is {a} - {b}?",
    "{a}-{b}",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "Compute {a} - {b}",
    "What is the difference of {a} and {b}?",
    "Calculate {a} minus {b}.",
    "Take {b} away from {a}.",
)
EQUATION = re.compile(r"(?:^|\s)(\d+) ?([+-]) ?(\d+) ?= ?(\d+)\.?$", re.ASCII)


def working(a: int, b: int, sign: str) -> str:
    """The column-by-column working and the final equation for `a` `sign` `b`."""
    width = max(len(str(a)), len(str(b)))
    steps = []
    carry = 0
    for place in range(width):
        top, bottom = a // 10**place % 10, b // 10**place % 10
        third = f"{sign}{carry}" if place else ""
        if sign == "+":
            total = top + bottom + carry
            carry = total // 10
            steps.append(f"{top}+{bottom}{third}={total:02d}")
        else:
            borrow = int(top < bottom + carry)
            steps.append(f"{borrow}{top}-{bottom}{third}={10 * borrow + top - bottom - carry}")
            carry = borrow
    result = a + b if sign == "+" else a - b
    return f"{', '.join(steps)}. {a} {sign} {b} = {result}"


def _number(rng: random.Random) -> int:
    """A number whose length is mostly three digits, with the short ones well represented."""
    return rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3, 3)))


class Sums(Task):
    """Sums and differences, never below zero."""

    name = "sums"

    def draw(self, rng: random.Random) -> Example:
        a, b = _number(rng), _number(rng)
        sign = rng.choice("+-")
        if sign == "-" and a < b:
            a, b = b, a
        wording = rng.choice(ADD_WORDINGS if sign == "+" else SUBTRACT_WORDINGS)
        prompt = dress(rng, wording.format(a=a, b=b))
        return Example(family=self.name, prompt=prompt, answer=working(a, b, sign), data={"a": a, "b": b, "sign": sign})

    def key(self, example: Example) -> str:
        a, b, sign = example.data["a"], example.data["b"], example.data["sign"]
        if sign == "+":
            a, b = max(a, b), min(a, b)  # 2+3 and 3+2 are one problem
        return f"{a}{sign}{b}"

    def check(self, example: Example, reply: str) -> bool:
        """The reply ends with the equation that was asked for, and its result is right."""
        a, b, sign = example.data["a"], example.data["b"], example.data["sign"]
        found = EQUATION.search(reply.strip())
        if found is None:
            return False
        left, operator, right, result = found.groups()
        asked = [(str(a), str(b))] + ([(str(b), str(a))] if sign == "+" else [])
        return operator == sign and (left, right) in asked and result == str(a + b if sign == "+" else a - b)
