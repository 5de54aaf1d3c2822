"""An answer's thoughts, text and tool calls apart, however the answer arrives cut into pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from . import tools
from .detokenize import StopStrings, beginnings, open_end
from .tools import Call, CallReader, MalformedCall

OPEN, CLOSE, LABEL = "<|channel>", "<channel|>", "thought"


class Pieces(NamedTuple):
    """What an answer grows by: thought, text that the user reads, and calls that are complete now."""

    thoughts: str = ""
    text: str = ""
    calls: tuple[Call, ...] = ()


class ReplySplitter:
    """Splits an answer, a growing text that spells out its control tokens, into thoughts, text and tool calls.

    What stands in a channel, `<|channel>thought\\n…<channel|>`, is thought, its label line left out; a channel that is
    never closed is thought to the end; several channels are joined by a line break. Outside of channels
    `<|tool_call>…<tool_call|>` is a call, whether or not tools were offered; `CallReader` says what a call may look
    like. What begins as a call and is none (bad syntax, never closed) is not lost: it is read again as part of the
    answer, without its opening mark, so it becomes text. In a channel a call is thought. The marks themselves are
    given out nowhere, `<|"|>` included; only inside a call's strings everything stays as it is.

    All that `push` and `finish` return, joined, does not depend on where the answer was cut, and is never taken back.

    Args:
        think: whether the model was asked to think. If not, a bare label line `thought` at the very start of the
            answer is left out: models write it after the empty channel that the prompt ends with.
        strip: further control tokens that are left out.
        stops: strings that end the answer once the text holds them, see `StopStrings`; nothing after one is given out,
            no thought and no call either.
    """

    def __init__(self, *, think: bool = False, strip: Iterable[str] = (), stops: Iterable[str] = ()):
        # Longest first: where two marks begin at one place, the longer is meant.
        marks = {OPEN, CLOSE, tools.OPEN, tools.CLOSE, tools.QUOTE, *strip} - {""}
        self._pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        self._beginnings = beginnings(marks)
        self._stops = StopStrings(stops)
        self._held = ""
        self._inside = False
        self._reader: CallReader | None = None
        # Text since a channel or the answer began, while it may still be the label line; None once that's decided.
        self._label: str | None = None if think else ""
        self._answer_label = self._label  # the answer's own, set aside while a channel is open
        self._thought: list[str] = []
        self._text: list[str] = []
        self._calls: list[Call] = []
        self._thoughts_before = self._gap = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def push(self, text: str) -> Pieces:
        """Takes the next piece; returns what is now certain."""
        self._held += text
        self._scan(ended=False)
        return self._give()

    def finish(self) -> Pieces:
        """Returns what was held back; the answer has ended."""
        self._scan(ended=True)
        if self._label is not None and not self._inside:
            self._put(self._label)  # the answer is the beginning of "thought\n" and no more: a word, not a label
        self._label = None
        self._text.append(self._stops.finish())
        return self._give()

    def _scan(self, ended: bool) -> None:
        """Takes all of the held text that is certain: everything, if the answer has ended."""
        while not self.stopped:
            if self._reader is not None and not self._read(self._reader, ended):
                return
            # What is held back may begin a longer mark. If the answer ends there, shorter ones may stand in it.
            keep = len(self._held) - (0 if ended else open_end(self._held, self._beginnings))
            match = self._pattern.search(self._held)
            if match is None or match.start() >= keep:
                self._take(self._held[:keep])
                self._held = self._held[keep:]
                return
            self._take(self._held[: match.start()])
            self._held = self._held[match.end() :]
            self._mark(match[0])

    def _read(self, reader: CallReader, ended: bool) -> bool:
        """Gives the held text to the call that is open; returns whether that is over."""
        text, self._held = self._held, ""
        try:
            call = reader.push(text)
            if call is None and not ended:
                return False
        except MalformedCall:
            call = None
        self._reader = None
        if call is None:
            self._held = reader.text
            return True
        self._held = reader.rest
        self._put(self._label or "")
        self._label = self._answer_label = None
        if not self.stopped:
            self._calls.append(call)
        return True

    def _mark(self, mark: str) -> None:
        if mark == OPEN:
            self._leave(mark)
            self._inside, self._label = True, ""
            self._gap = self._thoughts_before
        elif mark == CLOSE:
            self._leave(mark)
            self._inside, self._label = False, self._answer_label
        elif mark == tools.OPEN and not self._inside:
            self._reader = CallReader()

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
            self._text.append(self._stops.push(text)[0])
            return
        if self._gap:
            self._thought.append("\n")
        self._gap, self._thoughts_before = False, True
        self._thought.append(text)

    def _give(self) -> Pieces:
        given = Pieces("".join(self._thought), "".join(self._text), tuple(self._calls))
        self._thought, self._text, self._calls = [], [], []
        return given
