"""Little stories on request: the free-text family, long enough for more than one canvas."""

import random
import re

from dgemma.tasks import story_grammar as grammar
from dgemma.tasks.task import Example, Task, dress

LISTS = {
    "name": tuple(grammar.HEROES),
    "animal": tuple(grammar.ANIMALS),
    "object": tuple(grammar.OBJECTS),
    "place": tuple(grammar.PLACES),
    "friend": tuple(grammar.FRIENDS),
}
STARTS = {
    "medium": ("Write a story", "Tell me a story", "Write a little story", "Tell a story"),
    "short": ("Write a short story", "Tell me a short story"),
    "long": ("Write a long story", "Tell me a long story"),
}
LENGTHS = ("short", "medium", "medium", "long")
# A request with fewer parts than this is so general that it always belongs to the training part.
FEWEST_HELD_OUT_PARTS = 3


def request(rng: random.Random, length: str, parts: dict[str, str]) -> str:
    """Word a request that names `parts` (any of name, animal, object, place, friend)."""
    text = rng.choice(STARTS[length])
    name, animal = parts.get("name"), parts.get("animal")
    if name and animal:
        text += f" about {name} the {animal}" if rng.random() < 0.3 else f" about a {animal} named {name}"
    elif name or animal:
        text += f" about {name}" if name else f" about a {animal}"
    if "object" in parts:
        verb = rng.choice(("looks for", "wants to find", "finds"))
        text += f" who {verb} a {parts['object']}" if name or animal else f" about a {parts['object']}"
    if "place" in parts:
        text += f" {grammar.PLACES[parts['place']]} the {parts['place']}"
    if "friend" in parts:
        friend = parts["friend"]
        text += f" with {friend} the {grammar.FRIENDS[friend]}"
    return dress(rng, text + ".")


class Stories(Task):
    """Stories; every reply that the grammar can tell about the parts that were asked for is right."""

    name = "stories"
    open = True

    def draw(self, rng: random.Random) -> Example:
        full = {part: rng.choice(choices) for part, choices in LISTS.items()}
        roll = rng.random()
        if roll < 0.04:
            named = []
        elif roll < 0.6:
            named = ["name", "animal", "object", "place"]
        else:
            named = [part for part in LISTS if rng.random() < 0.6]
        if named and "friend" not in named and rng.random() < 0.2:
            named.append("friend")
        parts = {part: full[part] for part in named}
        length = rng.choice(LENGTHS)
        return Example(
            family=self.name,
            prompt=request(rng, length, parts),
            answer=grammar.tell(rng, length, grammar.slots(**full)),
            data={"length": length, "parts": parts},
        )

    def key(self, example: Example) -> str | None:
        parts = example.data["parts"]
        if len(parts) < FEWEST_HELD_OUT_PARTS:
            return None
        return "|".join(parts.get(part, "") for part in LISTS)

    def check(self, example: Example, reply: str) -> bool:
        """The grammar can tell the reply, at the length and with the parts that were asked for.

        A part that the request leaves open may be any, but every part must be named, and only one of each: a
        second hero, animal, object, place or friend anywhere is refused.
        """
        text = reply.strip()
        parts = example.data["parts"]
        named = {part: _named(text, choices) for part, choices in LISTS.items()}
        if any(len(found) != 1 for found in named.values()):
            return False
        about = {part: found[0] for part, found in named.items()}
        if any(about[part] != wanted for part, wanted in parts.items()):
            return False
        return grammar.matches(text, example.data["length"], grammar.slots(**about))


def _named(text: str, choices: tuple[str, ...]) -> list[str]:
    return [choice for choice in choices if re.search(rf"\b{re.escape(choice)}\b", text)]
