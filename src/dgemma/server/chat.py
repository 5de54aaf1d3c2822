"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..events import Draft, Finish
from ..protocol import render
from ..protocol.chat import ChatAnswer, ChatCall
from ..protocol.errors import ApiError
from ..protocol.growth import Growth, Piece
from ..protocol.read import CHAT
from .job import Job
from .service import Service
from .stream import DONE, respond, sse


async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service
    call = await service.read(request, CHAT)
    assert isinstance(call, ChatCall)
    answer = call.begin(service.served())
    job = await service.submit(request.state.record, call.ask)
    events = _Chunks(call, answer, job).stream() if call.stream else None
    return await respond(request, job, whole=answer.whole, events=events, failure=failure)


def failure(error: ApiError) -> str:
    """The last event of a stream that fails."""
    return sse(error.body())


class _Chunks:
    """An answer as a stream."""

    def __init__(self, call: ChatCall, answer: ChatAnswer, job: Job):
        self.answer, self.job = answer, job
        options = call.body.stream_options
        self.usage_wanted = bool(options and options.include_usage)

    async def stream(self) -> AsyncIterator[str]:
        """The chunks: the role of each choice, text as it is certain, the reason it ended, usage."""
        answer, job = self.answer, self.job
        grown = [Growth() for _ in job.tickets]
        for index in range(len(grown)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in job.events():
            if isinstance(event, Draft):
                yield self._chunk(index, {}, diffusion={"draft": render.draft(event, index, answer.words)})
                continue
            first_call = grown[index].tool_calls
            for delta, piece in _deltas(grown[index].take(event), first_call):
                yield self._chunk(index, delta, piece=piece)
            if isinstance(event, Finish):
                yield self._chunk(index, {}, reason=render.finish_reason(event.result))
        if self.usage_wanted:
            yield sse({**answer.head, "choices": [], "usage": answer.usage(job.ordered(), job.prompt_tokens)})
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        piece: Piece | None = None,
        diffusion: dict[str, Any] | None = None,
    ) -> str:
        logprobs = render.chat_logprobs(piece.logprobs, self.answer.words) if piece and piece.logprobs else None
        chunk: dict[str, Any] = {
            **self.answer.head,
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
        }
        if self.usage_wanted:
            chunk["usage"] = None
        if diffusion:
            chunk["diffusion"] = diffusion
        return sse(chunk)


def _deltas(piece: Piece, first_call: int) -> list[tuple[dict[str, Any], Piece | None]]:
    """What is sent for a piece: thoughts, text and calls each by themselves; log-probabilities go with the text."""
    deltas: list[tuple[dict[str, Any], Piece | None]] = []
    if piece.thoughts:
        deltas.append(({"reasoning_content": piece.thoughts}, None))
    if piece.text or piece.logprobs:
        deltas.append(({"content": piece.text}, piece))
    if piece.tool_calls:
        deltas.append(({"tool_calls": render.tool_calls(piece.tool_calls, first_call)}, None))
    return deltas
