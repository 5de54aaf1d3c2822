"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..events import Draft, Finish, Result
from . import render
from .chat_schema import ChatRequest, to_prompt
from .errors import ApiError, invalid
from .fields import thinks
from .job import Growth, Job, Piece
from .sampling import Sampling, sampling
from .service import Ask, Service
from .stream import DONE, respond, sse


async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service
    body = await service.read(request, ChatRequest)
    service.check_model(body.model)
    settings = _sampling(body)
    options = body.stream_options
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
    if tools and body.parallel_tool_calls is False:
        raise invalid("parallel_tool_calls", "is not supported: how many calls the model makes is its own choice")
    job = await service.submit(
        request.state.record,
        Ask(
            prompts=[to_prompt(body.messages)],
            sampling=settings,
            choices=body.n or 1,
            think=thinks(body.reasoning_effort),
            tools=tools or None,
            drafts=bool(options and options.include_drafts),
        ),
    )
    answer = _Answer(service, body, job)
    events = answer.stream() if body.stream else None
    return await respond(request, job, whole=answer.whole, events=events, failure=failure)


def failure(error: ApiError) -> str:
    """The last event of a stream that fails."""
    return sse(error.body())


def _sampling(body: ChatRequest) -> Sampling:
    if body.max_tokens and body.max_completion_tokens:
        raise invalid("max_tokens", "max_completion_tokens says the same; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    if body.stream_options and not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    budget = "max_tokens" if body.max_tokens else "max_completion_tokens"
    given = {
        "max_new_tokens": (budget, body.max_tokens or body.max_completion_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p),
        "seed": ("seed", body.seed),
        "stop": ("stop", body.stop),
        "logit_bias": ("logit_bias", body.logit_bias),
        "logprobs": ("logprobs", (body.top_logprobs or 0) if body.logprobs else None),
    }
    return sampling(given, body.diffusion, prompt="messages", stream=bool(body.stream))


class _Answer:
    """The answer to one request, in either form."""

    def __init__(self, service: Service, body: ChatRequest, job: Job):
        self.job, self.body, self.words = job, body, service.words
        self.usage_wanted = bool(body.stream_options and body.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": render.new_id("chatcmpl-"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        if body.service_tier:
            self.head["service_tier"] = "default"
        if body.metadata and not body.stream:
            self.head["metadata"] = body.metadata

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """All choices."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self.head, "choices": choices, "usage": render.usage(self.job, self.words)}

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if result.thoughts:
            message["reasoning_content"] = result.thoughts
        if result.tool_calls:
            message |= {"content": result.text or None, "tool_calls": render.tool_calls(result.tool_calls)}
        return {
            "index": index,
            "message": message,
            "logprobs": None if result.logprobs is None else render.chat_logprobs(result.logprobs, self.words),
            "finish_reason": render.finish_reason(result),
        }

    async def stream(self) -> AsyncIterator[str]:
        """The chunks: the role of each choice, text as it is certain, the reason it ended, usage."""
        grown = [Growth() for _ in self.job.tickets]
        for index in range(len(grown)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.job.events():
            if isinstance(event, Draft):
                yield self._chunk(index, {}, diffusion={"draft": render.draft(event, index, self.words)})
                continue
            first_call = grown[index].tool_calls
            for delta, piece in _deltas(grown[index].take(event), first_call):
                yield self._chunk(index, delta, piece=piece)
            if isinstance(event, Finish):
                yield self._chunk(index, {}, reason=render.finish_reason(event.result))
        if self.usage_wanted:
            yield sse({**self.head, "choices": [], "usage": render.usage(self.job, self.words)})
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
        logprobs = render.chat_logprobs(piece.logprobs, self.words) if piece and piece.logprobs else None
        chunk: dict[str, Any] = {
            **self.head,
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
