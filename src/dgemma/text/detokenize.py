"""Text as it grows: only what can never change is given out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from .tokenizer import BYTE_SHAPE, Tokenizer

_CONTEXT = 8  # tokens kept before new ones: more than any character's bytes, so a window's edge is never seen
_WINDOW = 64


class StreamDecoder:
    """Decodes ids that arrive piece by piece: all that `push` and `finish` return, joined, is `decode` of all ids.

    A text may still change at its end: a character's first bytes wait for the others (byte-level tokenizers show a
    replacement character meanwhile), and a byte-fallback tokenizer takes a whole run of byte tokens at once, as
    characters if all of it is UTF-8 and as replacement characters if not. Such an end is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool = False):
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._fallback = _uses_byte_fallback(tokenizer)
        self._window: list[int] = []  # recent ids; their text's first `_sent` characters are given out
        self._sent = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that is now certain, perhaps none."""
        self._window += self._tokenizer.textual(ids, keep_special=self._keep_special)
        settled = len(self._window)
        while self._fallback and settled and self._is_byte(self._window[settled - 1]):
            settled -= 1
        text = self._decode(self._window[:settled])
        certain = len(text) - text.endswith("\ufffd")
        new = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if len(self._window) > _WINDOW and self._sent == len(text) and settled == len(self._window):
            self._shorten()
        return new

    def finish(self) -> str:
        """Returns what was held back; the decoder is then as new."""
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return rest

    def _shorten(self) -> None:
        """Forgets all but a few tokens, so that a step's cost does not grow with the answer."""
        context = self._window[-_CONTEXT:]
        text = self._decode(context)
        # Without a visible character a decoder that trims the start of a text would trim what comes next.
        if text.strip() and not text.endswith("\ufffd"):
            self._window, self._sent = context, len(text)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, keep_special=True)  # `textual` has left out what must be

    def _is_byte(self, token_id: int) -> bool:
        return BYTE_SHAPE.fullmatch(self._tokenizer.token_of(token_id) or "") is not None


class StopStrings:
    """Watches a growing text for strings that end it.

    The first of the strings to be complete ends the text, however the text is cut into pieces (of two that are
    complete at the same character, the longer one); it is not part of the text. What may be the beginning of one is
    held back.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = [stop for stop in stops if stop]
        self._beginnings = beginnings(self._stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns the text that is certain, and whether a stop string was met."""
        if self.stopped:
            return "", True
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            emit, self._held = self._held[: min(ends)[1]], ""
            return emit, True
        keep = open_end(self._held, self._beginnings)
        emit, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return emit, False

    def finish(self) -> str:
        """Returns what was held back: the text ended and it was no stop string."""
        rest, self._held = self._held, ""
        return rest


def beginnings(marks: Iterable[str]) -> frozenset[str]:
    """Every beginning of a mark that is not all of it."""
    return frozenset(mark[:length] for mark in marks for length in range(1, len(mark)))


def open_end(text: str, beginnings: frozenset[str]) -> int:
    """Length of the longest end of `text` that is one of `beginnings`; 0 where none is."""
    longest = max(map(len, beginnings), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if text[len(text) - n :] in beginnings), 0)


def _uses_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Whether the decoder joins runs of byte tokens."""
    decoder = tokenizer._inner.decoder
    if decoder is None:
        return False
    try:
        state = decoder.__getstate__()
        kinds = json.loads(state)
    except (AttributeError, TypeError, ValueError):
        return True  # unknown: holding back too much is the safe side
    parts = kinds.get("decoders", [kinds])
    return any(part.get("type") == "ByteFallback" for part in parts)
