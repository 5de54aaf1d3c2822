"""The story grammar as data, and the two things done with it: telling a story and matching one.

A story is a list of paragraphs, a paragraph a list of nodes:

- `Say`: one sentence, one of several templates; left out with a given chance;
- `Mix`: several sentences, some of them left out, in any order;
- `Fork`: one of several sequences of nodes, for events that belong together.

A template has `{slots}`, which are the same for the whole story, and `[a|b]`, a choice made on the spot.
All prose here is original to this project.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from dgemma.tasks.task import words

HEROES = {  # name -> he or she
    **dict.fromkeys(("Pip", "Oliver", "Milo", "Toby", "Finn", "Rufus", "Jasper", "Theo"), "he"),
    **dict.fromkeys(("Luna", "Daisy", "Poppy", "Ruby", "Hazel", "Molly", "Tilly", "Ivy"), "she"),
}
ANIMALS = words("fox rabbit bear mouse kitten puppy squirrel badger frog duckling pony lamb dragon goat")
OBJECTS = (
    "golden key",
    "silver bell",
    "red kite",
    "lost crown",
    "magic lantern",
    "blue feather",
    "brass compass",
    "music box",
    "glass star",
    "secret book",
    "wooden flute",
    "pearl ring",
    "copper coin",
    "moon stone",
)
PLACES = {  # place -> the word before "the place"
    "forest": "in",
    "valley": "in",
    "garden": "in",
    "swamp": "in",
    "meadow": "in",
    "canyon": "in",
    "mountain": "on",
    "island": "on",
    "beach": "on",
    "hill": "on",
    "lake": "by",
    "castle": "in",
}
FRIENDS = {  # name -> kind
    "Bramble": "hedgehog",
    "Olive": "owl",
    "Tully": "turtle",
    "Cole": "crow",
    "Digby": "mole",
    "Shelly": "snail",
    "Barnaby": "beaver",
    "Robin": "sparrow",
    "Greta": "goose",
}
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


@dataclass(frozen=True)
class Say:
    """One sentence out of `templates`, said with probability `chance`."""

    templates: tuple[str, ...]
    chance: float = 1.0


@dataclass(frozen=True)
class Mix:
    """Between `fewest` and `most` of the sentences, each from its own templates, in any order."""

    sentences: tuple[tuple[str, ...], ...]
    fewest: int
    most: int


@dataclass(frozen=True)
class Fork:
    """One of several sequences of nodes."""

    branches: tuple[tuple["Node", ...], ...]


Node = Say | Mix | Fork


def _say(*templates: str, chance: float = 1.0) -> Say:
    return Say(templates, chance)


OPENING = (
    _say(
        "Once upon a time there was a little {animal} named {name}.",
        "There once was a [brave|gentle|curious|cheerful] {animal} named {name}.",
        "Long ago there lived a [small|young|clever] {animal} named {name}.",
    ),
    _say(
        "{He} lived in a [cosy|tiny|warm] house near the {place}.",
        "{His} home was a [round|crooked|little] house at the edge of the {place}.",
        "{He} had a [neat|sunny|quiet] den not far from the {place}.",
    ),
    _say(
        "{He} loved [honey cakes|old songs|long walks|quiet mornings] and the smell of [rain|fresh bread|pine trees].",
        "Everyone knew {him} for {his} [kind heart|bright eyes|loud laugh].",
        chance=0.6,
    ),
    _say(
        "One evening {he} heard a tale about a {object} that was hidden {by} the {place}.",
        "An old map said that a {object} was hidden {by} the {place}.",
        "More than anything in the world, {name} wished to find the {object} that was lost {by} the {place}.",
    ),
)
JOURNEY = (
    _say(
        "One [sunny|misty|windy|frosty] morning {name} packed [a loaf of bread|three apples|a warm scarf] and set out.",
        "On a [bright|cloudy|cold|golden] day {name} put on {his} [green coat|red boots|blue hat] and set off.",
        "Early the next day, {name} locked the door, took a deep breath and started to walk.",
    ),
    Mix(
        (
            ("The path was [long|steep|narrow] and [full of leaves|wet with dew|bright with flowers].",),
            ("{He} hummed a [merry|soft|funny] tune along the way.",),
            ("The wind smelled of [wild mint|apples|summer].", "Far above, the clouds drifted [slowly|lazily] by."),
        ),
        1,
        2,
    ),
    _say(
        "Soon {he} came to the {place}.",
        "By noon {he} had reached the {place}.",
        "At last the {place} lay before {him}.",
    ),
    _say(
        "{name} felt [nervous|excited|a little afraid], but {he} did not turn back.",
        "{He} looked [left and right|all around], but there was no {object} to be seen.",
    ),
)
MEETING = (
    _say(
        "There {he} met {friend} the {kind}, who was [sitting on a stone|drinking tea|counting clouds|mending a net].",
        "Just then {friend} the {kind} came [down the path|around the corner|out of the shade].",
    ),
    _say(
        '"Where are you going?" asked {friend}.',
        '"You look lost," said {friend}.',
        '"What brings you here, little {animal}?" asked {friend}.',
    ),
    _say(
        '"I am looking for a {object}," said {name}.',
        '"I want to find the {object}," {name} answered.',
    ),
    _say(
        '"Then let me help you," said {friend} with a [smile|nod|wink].',
        '"Two can search better than one," said {friend}.',
        '"I know these parts well, so follow me," said {friend}.',
    ),
    _say("{name} was [glad|happy|grateful] to have a friend.", "So they went on together.", chance=0.7),
)
REST = (
    _say(
        "When the sun went down, they made a small fire and shared [a pot of soup|some bread|a bag of nuts].",
        "At night they found a dry place to sleep under [an old oak|a big rock|the stars].",
    ),
    _say(
        "{friend} told a [funny|strange|sweet] story about [the moon|a giant|the sea].",
        "{friend} sang a [slow|gentle|silly] song until the fire was low.",
    ),
    _say(
        "{name} fell asleep and dreamed of the {object}.",
        "{name} looked up at the sky and thought of home.",
    ),
)
TROUBLE = (
    Fork(
        (
            (
                _say("Then they came to a [wide|deep|cold] river with no bridge.", "But a wild river blocked the way."),
                _say(
                    "{name} found a fallen log, and together they pushed it across the water.",
                    "They tied some branches together and made a raft.",
                ),
                _say("Step by step they reached the other side.", "With wet feet they landed on the far bank."),
            ),
            (
                _say(
                    "Then they came to a cave that was as dark as night.",
                    "The trail led into a [deep|dark|silent] cave.",
                ),
                _say(
                    "{friend} lit a candle, and {name} went first.",
                    "They held on to a rope and felt their way along the wall.",
                ),
                _say("At the end of the cave they saw a small light.", "Soon they could see daylight again."),
            ),
            (
                _say(
                    "Then they came to a tall gate, and it was locked.",
                    "A [heavy|rusty] gate stood in their way.",
                ),
                _say(
                    "{name} was small enough to slip under it and open it from inside.",
                    "{friend} knew the magic word, and {name} said it out loud.",
                ),
                _say("The gate swung open with a long creak.", "Slowly the gate opened."),
            ),
            (
                _say(
                    "Suddenly the sky turned black and a storm began.",
                    "Then thunder rolled, and rain began to pour.",
                ),
                _say(
                    "They hid under a [big|hollow] tree and waited.",
                    "{name} held a giant leaf over both of them.",
                ),
                _say("After a while the sun came out again.", "When the rain stopped, a rainbow showed them the way."),
            ),
            (
                _say(
                    "Then a [grumpy|sleepy] troll stood up and asked for a riddle.",
                    "A huge troll sat in the middle of the road.",
                ),
                _say(
                    "{name} told the best joke that {he} knew.",
                    "{name} bowed and asked very politely if they might pass.",
                ),
                _say("The troll laughed so hard that he let them go.", "The troll smiled and stepped aside."),
            ),
        )
    ),
)
ENDING = (
    _say(
        "And there, under [a flat stone|a mossy log|a bed of leaves], lay the {object}.",
        "Behind [an old wall|a thorn bush|a curtain of vines] they found the {object} at last.",
        "Something [shiny|small] lay in the grass, and it was the {object}.",
    ),
    _say('"You did it!" cried {friend}.', '"We did it!" {name} shouted.', chance=0.6),
    _say(
        "{name} held it [close|tight|up high] and laughed with joy.",
        "It was even [lovelier|finer] than {name} had dreamed.",
    ),
    _say(
        "That night they had a [great|merry] feast with all their neighbours.",
        "They walked home together under the [silver moon|evening sky].",
    ),
    _say(
        "{name} put the {object} on the shelf beside {his} bed, and {friend} came to visit every week.",
        "From that day on, {name} and {friend} were the best of friends.",
        "{name} had found the {object}, but the best thing {he} had found was a friend.",
    ),
)
CLOSING = "The end."
SHAPES = {
    "short": (OPENING, JOURNEY, MEETING, ENDING),
    "medium": (OPENING, JOURNEY, MEETING, TROUBLE, ENDING),
    "long": (OPENING, JOURNEY, MEETING, REST, TROUBLE, ENDING),
}


def slots(*, name: str, animal: str, object: str, place: str, friend: str) -> dict[str, str]:
    """All template slots that follow from who and what the story is about."""
    he, him, his = PRONOUNS[HEROES[name]]
    return {
        "name": name,
        "animal": animal,
        "object": object,
        "place": place,
        "by": PLACES[place],
        "friend": friend,
        "kind": FRIENDS[friend],
        "he": he,
        "him": him,
        "his": his,
        "He": he.capitalize(),
        "His": his.capitalize(),
    }


def _fill(rng: random.Random, template: str, values: Mapping[str, str]) -> str:
    chosen = re.sub(r"\[([^]]*)\]", lambda found: rng.choice(found.group(1).split("|")), template)
    return chosen.format_map(values)


def _tell(rng: random.Random, nodes: Sequence[Node], values: Mapping[str, str]) -> list[str]:
    sentences = []
    for node in nodes:
        match node:
            case Say(templates, chance):
                if chance == 1.0 or rng.random() < chance:
                    sentences.append(_fill(rng, rng.choice(templates), values))
            case Mix(options, fewest, most):
                chosen = rng.sample(options, rng.randint(fewest, most))
                sentences += [_fill(rng, rng.choice(templates), values) for templates in chosen]
            case Fork(branches):
                sentences += _tell(rng, rng.choice(branches), values)
    return sentences


def tell(rng: random.Random, length: str, values: Mapping[str, str]) -> str:
    """Tell a story of the given length (`short`, `medium`, `long`); paragraphs are a blank line apart."""
    paragraphs = [" ".join(_tell(rng, nodes, values)) for nodes in SHAPES[length]]
    paragraphs[-1] += f" {CLOSING}"
    return "\n\n".join(paragraphs)


def _sentence_pattern(templates: Sequence[str], values: Mapping[str, str]) -> str:
    """A pattern for one sentence with the space before it."""
    patterns = []
    for template in templates:
        parts = re.split(r"\[([^]]*)\]", template)  # odd parts are on-the-spot choices
        for i, part in enumerate(parts):
            if i % 2:
                parts[i] = "(?:" + "|".join(map(re.escape, part.split("|"))) + ")"
            else:
                parts[i] = re.escape(part.format_map(values))
        patterns.append("".join(parts))
    return "(?: (?:" + "|".join(patterns) + "))"


def _pattern(nodes: Sequence[Node], values: Mapping[str, str]) -> str:
    pieces = []
    for node in nodes:
        match node:
            case Say(templates, chance):
                pieces.append(_sentence_pattern(templates, values) + ("" if chance == 1.0 else "?"))
            case Mix(options, fewest, most):
                orders = [
                    "".join(_sentence_pattern(templates, values) for templates in order)
                    for size in range(fewest, most + 1)
                    for chosen in combinations(options, size)
                    for order in permutations(chosen)
                ]
                pieces.append("(?:" + "|".join(orders) + ")")
            case Fork(branches):
                pieces.append("(?:" + "|".join(_pattern(branch, values) for branch in branches) + ")")
    return "".join(pieces)


def matches(text: str, length: str, values: Mapping[str, str]) -> bool:
    """Whether the grammar can tell exactly `text` at this length with these slots."""
    shape = SHAPES[length]
    paragraphs = text.split("\n\n")
    if len(paragraphs) != len(shape) or not paragraphs[-1].endswith(f" {CLOSING}"):
        return False
    paragraphs[-1] = paragraphs[-1].removesuffix(f" {CLOSING}")
    return all(
        re.fullmatch(_pattern(nodes, values), f" {paragraph}") is not None
        for nodes, paragraph in zip(shape, paragraphs, strict=True)
    )
