"""What a canvas looks like: every position gets a look, and the looks become rows of a given width.

Nothing here knows terminals or SVG; `live` and `record` draw the rows. Each look differs in weight or shape and not
by colour alone: settled text is bold, revised text underlined, a guess faint, and noise is redacted with shading
that grows denser with its entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from ..events import Draft
from .terminal import columns_of, visible


class Look(Enum):
    """How one position is drawn."""

    WRITTEN = "written"  # committed text
    SETTLED = "settled"  # accepted in this step
    REVISED = "revised"  # its best token has just changed
    GUESS = "guess"  # not accepted, but the model is nearly sure
    LOW = "low"  # noise, by entropy
    MIDDLE = "middle"
    HIGH = "high"


# Nats: below the first the best token is more likely than not; above the last even a hundred guesses would miss.
GUESS_NATS, LOW_NATS, MIDDLE_NATS = 0.7, 2.0, 4.0
NOISE = {Look.LOW: "·", Look.MIDDLE: "░", Look.HIGH: "▒"}
NOISE_COLUMNS = 7  # a redacted token is at most this wide: noise should not stretch the page
TAB = 8
PARTIAL = "▯"  # a piece of a character whose other bytes are not there yet
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Cell:
    """The text of one position (it may hold several characters, a newline, or nothing) and its look."""

    text: str
    look: Look


Row = list[tuple[str, Look]]  # runs of equal look


class Decoder(Protocol):
    """What the canvas needs of a tokenizer."""

    def decode(self, tokens: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of `tokens`; marks such as the end of a turn are kept when asked for."""
        ...


class Pieces:
    """The text of each token by itself, remembered; `end_tokens` end an answer."""

    def __init__(self, tokenizer: Decoder, end_tokens: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.end_tokens = frozenset(end_tokens)
        self._known: dict[tuple[int, ...], str] = {}

    def split(self, tokens: Sequence[int]) -> list[str]:
        """One string a token. A character spread over several tokens stands at the first of them."""
        pieces = [self._decode((token,)) for token in tokens]
        index = 0
        while index < len(pieces):
            if "\ufffd" in pieces[index]:
                pieces[index] = PARTIAL
                for end in range(index + 2, min(index + 4, len(pieces)) + 1):
                    whole = self._decode(tuple(tokens[index:end]))
                    if "\ufffd" not in whole:
                        pieces[index:end] = [whole] + [""] * (end - index - 1)
                        index = end - 1
                        break
            index += 1
        return [visible(piece) for piece in pieces]

    def _decode(self, tokens: tuple[int, ...]) -> str:
        if tokens not in self._known:
            self._known[tokens] = self.tokenizer.decode(list(tokens), keep_special=True)
        return self._known[tokens]


def look_at(draft: Draft, position: int) -> Look:
    """The look of one position of a draft."""
    entropy = draft.entropies[position]
    settled = draft.settled[position]
    if settled or entropy < GUESS_NATS:
        # In the first step nothing was there to be revised.
        if draft.changed[position] and draft.step > 1:
            return Look.REVISED
        return Look.SETTLED if settled else Look.GUESS
    if entropy < LOW_NATS:
        return Look.LOW
    return Look.MIDDLE if entropy < MIDDLE_NATS else Look.HIGH


def cells(draft: Draft, pieces: Pieces) -> list[Cell]:
    """The positions of a draft up to the first end token that the model is sure of; what follows it is hidden."""
    result = []
    for position, piece in enumerate(pieces.split(draft.tokens)):
        look = look_at(draft, position)
        if draft.tokens[position] in pieces.end_tokens:
            if look not in NOISE:
                break
            piece = " "
        result.append(Cell(redact(piece, look) if look in NOISE else piece, look))
    return result


def redact(piece: str, look: Look) -> str:
    """A noise token as shading of about its own shape."""
    sign = NOISE[look]
    shape = "".join(" " if character.isspace() else sign for character in piece[:NOISE_COLUMNS])
    return shape if shape.strip() else sign


def wrap(content: Sequence[Cell], width: int, *, words: bool = False) -> list[Row]:
    """Rows of at most `width` columns.

    They break where a terminal breaks them, so that text stays where it is when it is committed; or, with `words`,
    at spaces where there are any.
    """
    rows: list[list[tuple[str, Look]]] = [[]]  # character by character
    column = 0
    for cell in content:
        for character in cell.text:
            if character == "\n":
                rows.append([])
                column = 0
                continue
            if character == "\t":
                character = " " * min(TAB - column % TAB, max(1, width - column))
            blank = character[0] == " "
            # The space before a revised word is not underlined with it.
            look = Look.SETTLED if cell.look is Look.REVISED and blank else cell.look
            taken = len(character) if blank else columns_of(character)
            if column + taken > width and column:
                if words and blank:
                    continue
                rows.append(_last_word(rows[-1]) if words else [])
                column = sum(columns_of(text) for text, _ in rows[-1])
            rows[-1].append((character, look))
            column += taken
    return [_runs(row) for row in rows]


def _last_word(row: list[tuple[str, Look]]) -> list[tuple[str, Look]]:
    """Takes the characters after the last space of `row` out of it; none when that would leave it empty."""
    for index in range(len(row) - 1, 0, -1):
        if row[index][0][0] == " ":
            word = row[index + 1 :]
            del row[index + 1 :]
            return word
    return []


def _runs(row: list[tuple[str, Look]]) -> Row:
    return [("".join(text for text, _ in group), look) for look, group in groupby(row, key=itemgetter(1))]


@dataclass(frozen=True)
class Window:
    """The rows to show, and how many there are above and below them."""

    rows: list[Row]
    above: int = 0
    below: int = 0


def window(rows: list[Row], height: int) -> Window:
    """At most `height` rows, around the first one that is still noise (the last rows when none is).

    Where rows are left out, one of the `height` is left free for the line that says so.
    """
    if len(rows) <= height:
        return Window(rows)
    focus = next((i for i, row in enumerate(rows) if any(look in NOISE for _, look in row)), len(rows) - 1)
    shown = max(1, height - 2)
    start = max(0, min(focus - shown // 3, len(rows) - shown))
    if start == 0:
        shown = max(1, height - 1)
    elif start + shown >= len(rows):
        shown = max(1, height - 1)
        start = len(rows) - shown
    return Window(rows[start : start + shown], start, len(rows) - start - shown)


def columns(text: str) -> int:
    """Columns of a text without line breaks."""
    return sum(columns_of(character) for character in text)


def caption(draft: Draft, width: int, elapsed: float | None = None, history: Sequence[float] = ()) -> str:
    """One line of figures, the fullest that fits into `width` columns."""
    clock = [] if elapsed is None else [f"{elapsed:.1f} s"]
    step = f"step {draft.step}/{draft.max_steps}"
    nats = f"{draft.mean_entropy:.2f} nats"
    speed = f"{draft.tokens_per_forward:.1f} tokens/forward"
    bars = [sparkline(history)] if history else []
    short = f"{draft.canvas + 1}:{draft.step}/{draft.max_steps}"
    choices = (
        [f"canvas {draft.canvas + 1}", step, " ".join([nats, *bars]), speed, *clock],
        [f"canvas {draft.canvas + 1}", step, nats, speed, *clock],
        [f"canvas {draft.canvas + 1}", step, nats, *clock],
        [short, nats, *clock],
        [short, f"{draft.mean_entropy:.2f}", *clock],
        [short, *clock],
        [short],
    )
    for parts in choices:
        line = " · ".join(parts)
        if columns(line) <= width:
            return line
    return short[:width]


def sparkline(values: Sequence[float], length: int = 12) -> str:
    """The last values as bars, the highest of all of them being full; square roots, to show the low end too."""
    top = max(values, default=0.0) or 1.0
    return "".join(BARS[min(7, int(8 * (max(0.0, value) / top) ** 0.5))] for value in values[-length:])
