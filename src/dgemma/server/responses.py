"""`POST /v1/responses`, and the responses that are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..events import Draft, Result
from ..protocol import render
from ..protocol.errors import ApiError, invalid
from ..protocol.growth import Growth
from ..protocol.read import RESPONSES
from ..protocol.responses import ResponseAnswer, ResponseCall
from .job import Job
from .service import Service
from .stream import respond, sse

Json = dict[str, Any]


async def create_response(request: Request) -> Response:
    """An answer to one turn, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service

    def earlier(name: str) -> Sequence[Mapping[str, Any]]:
        return service.store.get(name, param="previous_response_id").conversation

    call = await service.read(request, RESPONSES, earlier=earlier)
    assert isinstance(call, ResponseCall)
    begun = call.begin(service.served())
    job = await service.submit(request.state.record, call.ask)
    answer = _Answer(service, call, begun, job)
    events = answer.stream() if call.stream else None
    return await respond(request, job, whole=answer.whole, events=events, failure=answer.failure)


async def get_response(response_id: str, request: Request) -> Response:
    """A response that is kept. Streaming it again is refused.

    Raises:
        ApiError: there is none of this id, or the query asks for more.
    """
    service: Service = request.app.state.service
    service.serving()
    for name, value in request.query_params.items():
        if value != "false" or name not in ("stream", "include_obfuscation"):
            raise invalid(name, "is not supported for a response that is kept", "unsupported_value")
    return JSONResponse(dict(service.store.get(response_id).response))


async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets a response.

    Raises:
        ApiError: there is none of this id.
    """
    service: Service = request.app.state.service
    service.serving()
    service.store.delete(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


class _Answer:
    """An answer, in either form, that is kept when it has ended."""

    def __init__(self, service: Service, call: ResponseCall, answer: ResponseAnswer, job: Job):
        self.store, self.call, self.answer, self.job = service.store, call, answer, job
        self.number = 0

    def whole(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """The response."""
        return self._kept(self.answer.whole(results, prompt_tokens), results[0])

    async def stream(self) -> AsyncIterator[str]:
        """The published events, in their order, and drafts between them where they were asked for."""
        answer, job = self.answer, self.job
        yield self._event({"type": "response.created", "response": answer.response})
        yield self._event({"type": "response.in_progress", "response": answer.response})
        growth = Growth()
        async for _, event in job.events():
            if isinstance(event, Draft):
                draft = render.draft(event, 0, answer.words)
                yield self._event({"type": "response.diffusion.draft", "diffusion": {"draft": draft}})
                continue
            for told in answer.output.push(growth.take(event)):
                yield self._event(told)
        results = job.ordered()
        for told in answer.output.finish(answer.status(results[0])):
            yield self._event(told)
        response = self._kept(answer.ended(results, job.prompt_tokens), results[0])
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: ApiError) -> str:
        """The last event of a stream that fails."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "output": self.answer.output.items,
        }
        return self._event({"type": "response.failed", "response": {**self.answer.response, **failed}})

    def _event(self, event: Json) -> str:
        numbered = {"type": event["type"], "sequence_number": self.number, **event}
        self.number += 1
        return sse(numbered, event["type"])

    def _kept(self, response: Json, result: Result) -> Json:
        if response["store"]:
            self.store.put(response, [*self.call.conversation, self.answer.message(result)])
        return response
