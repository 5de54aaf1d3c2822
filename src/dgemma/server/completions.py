"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..events import Draft, Finish, Result, TokenLogprob
from . import render
from .chat import failure
from .completions_schema import CompletionRequest
from .errors import invalid
from .job import Growth, Job
from .sampling import Sampling, sampling
from .service import Ask, Service
from .stream import DONE, respond, sse


async def completions(request: Request) -> Response:
    """What goes on from each prompt, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service
    body = await service.read(request, CompletionRequest)
    service.check_model(body.model)
    options = body.stream_options
    job = await service.submit(
        request.state.record,
        Ask(
            prompts=body.prompt,
            sampling=_sampling(body),
            choices=body.n or 1,
            raw=isinstance(body.prompt[0], str),
            drafts=bool(options and options.include_drafts),
        ),
    )
    answer = _Answer(service, body, job)
    events = answer.stream() if body.stream else None
    return await respond(request, job, whole=answer.whole, events=events, failure=failure)


def _sampling(body: CompletionRequest) -> Sampling:
    if body.best_of is not None and body.best_of not in (1, body.n):
        raise invalid("best_of", "needs to be n, or left out: every answer that is made is given")
    if body.best_of == 1 and (body.n or 1) > 1:
        raise invalid("best_of", "is less than n")
    if body.stream_options and not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    given = {
        "max_new_tokens": ("max_tokens", body.max_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p),
        "seed": ("seed", body.seed),
        "stop": ("stop", body.stop),
        "logit_bias": ("logit_bias", body.logit_bias),
        "logprobs": ("logprobs", body.logprobs),
    }
    return sampling(given, body.diffusion, prompt="prompt", stream=bool(body.stream))


class _Answer:
    """The answer to one request, in either form."""

    def __init__(self, service: Service, body: CompletionRequest, job: Job):
        self.job, self.words = job, service.words
        self.usage_wanted = bool(body.stream_options and body.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": render.new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """All choices."""
        choices = [
            self._choice(index, result.text, result.finish_reason, result.thoughts, result.logprobs, 0)
            for index, result in enumerate(results)
        ]
        return {**self.head, "choices": choices, "usage": render.usage(self.job, self.words)}

    async def stream(self) -> AsyncIterator[str]:
        """The chunks: text as it is certain, the reason it ended, usage."""
        grown = [Growth() for _ in self.job.tickets]
        offsets = [0] * len(grown)
        async for index, event in self.job.events():
            if isinstance(event, Draft):
                empty = self._choice(index, "", None, None, None, 0)
                yield self._chunk([empty], {"diffusion": {"draft": render.draft(event, index, self.words)}})
                continue
            piece = grown[index].take(event)
            reason = event.result.finish_reason if isinstance(event, Finish) else None
            if piece or reason:
                logprobs = piece.logprobs or None
                yield self._chunk(
                    [self._choice(index, piece.text, reason, piece.thoughts, logprobs, offsets[index])], {}
                )
                offsets[index] += sum(len(self.words.text(entry.token)) for entry in piece.logprobs)
        if self.usage_wanted:
            yield self._chunk([], {"usage": render.usage(self.job, self.words)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        return sse({**self.head, "choices": choices, **({"usage": None} if self.usage_wanted else {}), **more})

    def _choice(
        self,
        index: int,
        text: str,
        reason: str | None,
        thoughts: str | None,
        logprobs: tuple[TokenLogprob, ...] | None,
        offset: int,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else render.completion_logprobs(logprobs, self.words, offset),
            "finish_reason": reason,
            **({"reasoning_content": thoughts} if thoughts else {}),
        }
