"""An answer's thought channel apart from its text, however the answer arrives cut into pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .detokenize import beginnings, open_end

OPEN, CLOSE, LABEL = "<|channel>", "<channel|>", "thought"


class ChannelSplitter:
    """Splits `<|channel>thought\\n…<channel|>` from the answer in a growing text that spells out its control tokens.

    What stands in a channel is thought, its label line left out; a channel that is never closed is thought to the
    end; several channels are joined by a line break. All that `push` and `finish` return, joined, does not depend on
    where the text was cut, and is never taken back.

    Args:
        think: whether the model was asked to think. If not, a bare label line `thought` at the very start of the
            answer is left out: models write it after the empty channel that the prompt ends with.
        strip: further control tokens that are left out of both.
    """

    def __init__(self, *, think: bool = False, strip: Iterable[str] = ()):
        # Longest first: where two marks begin at one place, the longer is meant.
        marks = sorted({OPEN, CLOSE, *strip} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._beginnings = beginnings(marks)
        self._held = ""
        self._inside = False
        # Text since a channel or the answer began, while it may still be the label line; None once that's decided.
        self._label: str | None = None if think else ""
        self._answer_label = self._label  # the answer's own, set aside while a channel is open
        self._thought: list[str] = []
        self._text: list[str] = []
        self._thoughts_before = self._gap = False

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next piece; returns what is now certain: (more thought, more of the answer)."""
        self._held += text
        while True:
            keep = len(self._held) - open_end(self._held, self._beginnings)
            match = self._pattern.search(self._held)
            if match is None or match.start() >= keep:
                break
            self._take(self._held[: match.start()])
            self._held = self._held[match.end() :]
            self._mark(match[0])
        self._take(self._held[:keep])
        self._held = self._held[keep:]
        return self._give()

    def finish(self) -> tuple[str, str]:
        """Returns what was held back; the text has ended."""
        # What is held began a longer mark than came: shorter marks may stand in it.
        while match := self._pattern.search(self._held):
            self._take(self._held[: match.start()])
            self._held = self._held[match.end() :]
            self._mark(match[0])
        self._take(self._held)
        self._held = ""
        if self._label is not None and not self._inside:
            self._put(self._label)  # the answer is the beginning of "thought\n" and no more: a word, not a label
        self._label = None
        return self._give()

    def _mark(self, mark: str) -> None:
        if mark == OPEN:
            self._leave(mark)
            self._inside, self._label = True, ""
            self._gap = self._thoughts_before
        elif mark == CLOSE:
            self._leave(mark)
            self._inside, self._label = False, self._answer_label

    def _leave(self, mark: str) -> None:
        """Decides about the label that is still open where a channel begins or ends."""
        if not self._label:
            return
        if self._label != LABEL or not (self._inside or mark == CLOSE):
            self._put(self._label)
        if not self._inside:
            self._answer_label = None

    def _take(self, text: str) -> None:
        """Adds text that holds no mark."""
        if self._label is None or not text:
            self._put(text)
            return
        seen = self._label + text
        line = LABEL + "\n"
        if line.startswith(seen) and seen != line:
            self._label = seen
            return
        self._label = None
        if not self._inside:
            self._answer_label = None
        self._put(seen.removeprefix(line))

    def _put(self, text: str) -> None:
        if not text:
            return
        if not self._inside:
            self._text.append(text)
            return
        if self._gap:
            self._thought.append("\n")
        self._gap, self._thoughts_before = False, True
        self._thought.append(text)

    def _give(self) -> tuple[str, str]:
        given = "".join(self._thought), "".join(self._text)
        self._thought, self._text = [], []
        return given


def split_thoughts(text: str, *, think: bool = False, strip: Iterable[str] = ()) -> tuple[str | None, str]:
    """A whole answer's thoughts and text; thoughts without outer white space, None where there are none.

    Arguments are those of `ChannelSplitter`.
    """
    splitter = ChannelSplitter(think=think, strip=strip)
    parts = [splitter.push(text), splitter.finish()]
    thought = "".join(part[0] for part in parts).strip()
    return thought or None, "".join(part[1] for part in parts)
