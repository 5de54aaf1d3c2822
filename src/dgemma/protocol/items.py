"""Items of `/v1/responses`: those of a request as chat messages, those of an answer as it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..events import TokenLogprob, ToolCall
from . import render
from .chat_schema import merge_instructions
from .fields import plain
from .growth import Piece
from .served import Words

Json = dict[str, Any]


def to_messages(items: str | Sequence[Any]) -> list[Json]:
    """A request's input as chat messages. Thoughts and calls belong to the assistant's message beside them."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    thoughts = ""
    item: Any
    for item in items:
        if item.type == "reasoning":
            thoughts += plain(item.content or item.summary) or ""
            continue
        if item.type == "function_call" or (item.type == "message" and item.role == "assistant"):
            _assistant(messages, item, thoughts)
        else:
            messages += _only(thoughts)
            messages.append(_from_outside(item))
        thoughts = ""
    return merge_instructions(messages + _only(thoughts))


def _only(thoughts: str) -> list[Json]:
    """Thoughts after which nothing was said: an answer may have ended in the middle of them."""
    return [{"role": "assistant", "content": "", "reasoning_content": thoughts}] if thoughts else []


def _from_outside(item: Any) -> Json:
    if item.type == "message":
        return {"role": "system" if item.role == "developer" else item.role, "content": plain(item.content)}
    name = {"name": item.name} if item.name else {}
    return {"role": "tool", "tool_call_id": item.call_id, "content": plain(item.output), **name}


def _assistant(messages: list[Json], item: Any, thoughts: str) -> None:
    """Adds an item of the assistant's: a call joins the message right before it."""
    if item.type == "message":
        messages.append({"role": "assistant", "content": plain(item.content)})
    elif thoughts or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    if thoughts:
        messages[-1]["reasoning_content"] = thoughts


class Output:
    """The items of an answer, and the events that tell of them.

    Thoughts, text and calls become items in the order in which they come; an item ends where another kind begins.
    The events lack `sequence_number`, which counts through the whole stream.
    """

    def __init__(self, words: Words):
        self.items: list[Json] = []
        self._words = words
        self._open = False
        self._waiting: list[Json] = []  # log-probabilities of tokens whose text is held back

    def push(self, piece: Piece) -> Iterator[Json]:
        """Takes what is new."""
        if piece.thoughts:
            yield from self._begin("reasoning")
            yield self._grow("response.reasoning_text.delta", piece.thoughts)
        self._waiting += self._logprobs(piece.logprobs)
        if piece.text:
            yield from self._begin("message")
            yield self._grow("response.output_text.delta", piece.text)
        for call in piece.tool_calls:
            yield from self._call(call)

    def finish(self, status: str) -> Iterator[Json]:
        """The answer has ended: "completed", or "incomplete" where its budget did not reach."""
        if not self.items:
            yield from self._begin("message")  # an empty answer is an answer
        yield from self._end(status)

    @property
    def _part(self) -> Json:
        return self.items[-1]["content"][0]

    @property
    def _place(self) -> Json:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _begin(self, kind: str) -> Iterator[Json]:
        if self._open and self.items[-1]["type"] == kind:
            return
        yield from self._end("completed")
        part: Json
        if kind == "message":
            self.items.append(
                {"id": render.new_id("msg_"), "type": kind, "role": "assistant", "status": "in_progress", "content": []}
            )
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self.items.append(
                {"id": render.new_id("rs_"), "type": kind, "status": "in_progress", "summary": [], "content": []}
            )
            part = {"type": "reasoning_text", "text": ""}
        self._open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(self.items[-1])}
        self.items[-1]["content"].append(part)
        yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": dict(part)}

    def _grow(self, event: str, text: str) -> Json:
        self._part["text"] += text
        told: Json = {"type": event, **self._place, "content_index": 0, "delta": text}
        if event == "response.output_text.delta":
            told["logprobs"], self._waiting = self._waiting, []
            self._part["logprobs"] += told["logprobs"]
        return told

    def _end(self, status: str) -> Iterator[Json]:
        if not self._open:
            return
        item, part, self._open = self.items[-1], self._part, False
        item["status"] = status
        done: Json = {**self._place, "content_index": 0, "text": part["text"]}
        if item["type"] == "message":
            part["logprobs"] += self._waiting
            self._waiting = []
            yield {"type": "response.output_text.done", **done, "logprobs": part["logprobs"]}
        else:
            yield {"type": "response.reasoning_text.done", **done}
        yield {"type": "response.content_part.done", **self._place, "content_index": 0, "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _call(self, call: ToolCall) -> Iterator[Json]:
        yield from self._end("completed")
        item = {
            "id": render.new_id("fc_"),
            "type": "function_call",
            "status": "completed",
            "call_id": render.new_id("call_"),
            "name": call.name,
            "arguments": call.arguments,
        }
        self.items.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": begun}
        yield {"type": "response.function_call_arguments.delta", **self._place, "delta": call.arguments}
        yield {"type": "response.function_call_arguments.done", **self._place, "arguments": call.arguments}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> list[Json]:
        return [
            {**entry, "bytes": entry["bytes"] or []} for entry in render.chat_logprobs(entries, self._words)["content"]
        ]


def _copy(item: Json) -> Json:
    return {**item, "content": list(item["content"])}
