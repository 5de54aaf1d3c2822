"""An answer as it grows."""

from __future__ import annotations

from dataclasses import dataclass

from ..events import Delta, Finish, Result, TokenLogprob, ToolCall


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an answer grows by."""

    text: str = ""
    thoughts: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.thoughts or self.tool_calls or self.logprobs)


@dataclass
class Growth:
    """What has been given out of one answer, so that a `Finish` gives the rest and nothing twice."""

    text: int = 0
    thoughts: int = 0
    tool_calls: int = 0
    logprobs: int = 0

    def take(self, event: Delta | Finish) -> Piece:
        """What this event adds."""
        if isinstance(event, Finish):
            return self.rest(event.result)
        piece = Piece(text=event.text, thoughts=event.thoughts, tool_calls=event.tool_calls, logprobs=event.logprobs)
        self.text += len(piece.text)
        self.thoughts += len(piece.thoughts)
        self.tool_calls += len(piece.tool_calls)
        self.logprobs += len(piece.logprobs)
        return piece

    def rest(self, result: Result) -> Piece:
        """What a finished answer has beyond what was given out."""
        return Piece(
            text=result.text[self.text :],
            thoughts=(result.thoughts or "")[self.thoughts :],
            tool_calls=result.tool_calls[self.tool_calls :],
            logprobs=(result.logprobs or ())[self.logprobs :],
        )
