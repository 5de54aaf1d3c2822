"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..events import Draft, Finish
from ..protocol import render
from ..protocol.completions import CompletionAnswer, CompletionCall
from ..protocol.growth import Growth
from ..protocol.read import COMPLETIONS
from .chat import failure
from .job import Job
from .service import Service
from .stream import DONE, respond, sse


async def completions(request: Request) -> Response:
    """What goes on from each prompt, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service
    call = await service.read(request, COMPLETIONS)
    assert isinstance(call, CompletionCall)
    answer = call.begin(service.served())
    job = await service.submit(request.state.record, call.ask)
    events = _Chunks(call, answer, job).stream() if call.stream else None
    return await respond(request, job, whole=answer.whole, events=events, failure=failure)


class _Chunks:
    """An answer as a stream."""

    def __init__(self, call: CompletionCall, answer: CompletionAnswer, job: Job):
        self.answer, self.job = answer, job
        options = call.body.stream_options
        self.usage_wanted = bool(options and options.include_usage)

    async def stream(self) -> AsyncIterator[str]:
        """The chunks: text as it is certain, the reason it ended, usage."""
        answer, job = self.answer, self.job
        grown = [Growth() for _ in job.tickets]
        offsets = [0] * len(grown)
        async for index, event in job.events():
            if isinstance(event, Draft):
                empty = answer.choice(index, "", None, None, None, 0)
                yield self._chunk([empty], {"diffusion": {"draft": render.draft(event, index, answer.words)}})
                continue
            piece = grown[index].take(event)
            reason = event.result.finish_reason if isinstance(event, Finish) else None
            if piece or reason:
                logprobs = piece.logprobs or None
                yield self._chunk(
                    [answer.choice(index, piece.text, reason, piece.thoughts, logprobs, offsets[index])], {}
                )
                offsets[index] += sum(len(answer.words.text(entry.token)) for entry in piece.logprobs)
        if self.usage_wanted:
            yield self._chunk([], {"usage": answer.usage(job.ordered(), job.prompt_tokens)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        return sse({**self.answer.head, "choices": choices, **({"usage": None} if self.usage_wanted else {}), **more})
