"""The text side of an answer: tokens in, text that is certain out."""

from __future__ import annotations

from collections.abc import Sequence

from ..events import ToolCall
from ..text import Pieces, ReplySplitter, StreamDecoder, Tokenizer


class Writer:
    """Decodes an answer's tokens, splits off thoughts and tool calls, watches for stop strings.

    Without a tokenizer nothing is written.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], *, think: bool):
        self.tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, keep_special=True) if tokenizer else None
        self._splitter = ReplySplitter(think=think, strip=tokenizer.controls if tokenizer else (), stops=stops)
        self._stops = bool(stops)
        self.text, self.thoughts = "", ""
        self.calls: tuple[ToolCall, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._splitter.stopped

    def push(self, tokens: Sequence[int]) -> int:
        """Takes more tokens; `text`, `thoughts` and `calls` grow by what is certain.

        Returns how many of them are the answer's: all, or those up to the one that completes a stop string.
        """
        if self._decoder is None or self.stopped:
            return len(tokens)
        parts = [tokens[at : at + 1] for at in range(len(tokens))] if self._stops else [tokens]
        for count, part in enumerate(parts, 1):
            self._write(self._splitter.push(self._decoder.push(part)))
            if self.stopped:
                return count
        return len(tokens)

    def finish(self) -> None:
        """The answer has ended: what was held back is written."""
        if self._decoder is not None and not self.stopped:
            self._write(self._splitter.push(self._decoder.finish()))
            self._write(self._splitter.finish())

    def _write(self, pieces: Pieces) -> None:
        self.thoughts += pieces.thoughts
        self.text += pieces.text
        self.calls += tuple(ToolCall(name=call.name, arguments=call.arguments) for call in pieces.calls)
