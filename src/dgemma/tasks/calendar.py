"""Day-of-week arithmetic: which day is n days before or after a weekday, n from 1 to 30."""

import random
import re

from dgemma.tasks.task import Example, Task, dress

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MOST_DAYS = 30
WORDINGS = (
    "What day is {count} {way} {day}?",
    "Which day is {count} {way} {day}?",
    "What day of the week is {count} {way} {day}?",
    "What weekday comes {count} {way} {day}?",
    "Tell me the day {count} {way} {day}.",
)
AFTER_WORDINGS = ("Today is {day}. What day is it in {count}?", "If today is {day}, what day is it in {count}?")
BEFORE_WORDINGS = (
    "Today is {day}. What day was it {count} ago?",
    "If today is {day}, what day was it {count} ago?",
)


def plural(number: int, noun: str) -> str:
    """`1 day`, `2 days`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Calendar(Task):
    """Counting weekdays; the answer takes out the whole weeks, then counts the days that are left."""

    name = "calendar"

    def draw(self, rng: random.Random) -> Example:
        number, way, day = rng.randint(1, MOST_DAYS), rng.choice(("before", "after")), rng.choice(DAYS)
        count = plural(number, "day")
        wording = rng.choice(WORDINGS + (AFTER_WORDINGS if way == "after" else BEFORE_WORDINGS))
        data = {"number": number, "way": way, "day": day}
        weeks, rest = divmod(number, 7)
        verb = "is" if number == 1 else "are"
        counted = ", ".join(f"{step} {_count(day, way, step)}" for step in range(rest + 1))
        answer = f"{count} {verb} {plural(weeks, 'week')} and {plural(rest, 'day')}. {counted}."
        prompt = dress(rng, wording.format(count=count, way=way, day=day))
        return Example(family=self.name, prompt=prompt, answer=answer, data=data)

    def key(self, example: Example) -> str:
        return "{number} {way} {day}".format(**example.data)

    def check(self, example: Example, reply: str) -> bool:
        """The last weekday that the reply names is the right one, and the reply ends with it."""
        data = example.data
        found = re.search(r"\b([A-Z][a-z]+day)\.?$", reply.strip())
        return found is not None and found.group(1) == _count(data["day"], data["way"], data["number"])


def _count(day: str, way: str, number: int) -> str:
    """The weekday that lies `number` days before or after `day`."""
    return DAYS[(DAYS.index(day) + (number if way == "after" else -number)) % 7]
