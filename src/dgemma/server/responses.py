"""`POST /v1/responses`, and the responses that are kept."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..events import Draft, Result
from . import render
from .errors import ApiError, invalid
from .fields import thinks
from .items import Output, to_messages
from .job import Growth, Job
from .responses_schema import LOGPROBS, FunctionTool, ResponseRequest
from .sampling import Sampling, sampling
from .service import Ask, Service
from .stream import respond, sse

Json = dict[str, Any]


async def create_response(request: Request) -> Response:
    """An answer to one turn, whole or as a stream.

    Raises:
        ApiError: the request cannot be honoured.
    """
    service: Service = request.app.state.service
    body = await service.read(request, ResponseRequest)
    if body.model is not None:
        service.check_model(body.model)
    settings = _sampling(body)
    tools = [_tool(tool) for tool in body.tools or ()] if body.tool_choice != "none" else []
    if tools and body.parallel_tool_calls is False:
        raise invalid("parallel_tool_calls", "is not supported: how many calls the model makes is its own choice")
    before: list[Json] = []
    if body.previous_response_id is not None:
        stored = service.store.get(body.previous_response_id, param="previous_response_id")
        before = [dict(message) for message in stored.conversation]
    conversation = before + to_messages(body.input)
    if not conversation:
        raise invalid("input", "holds no message")
    job = await service.submit(
        request.state.record,
        Ask(
            prompts=[_instructed(conversation, body.instructions)],
            sampling=settings,
            think=thinks(body.reasoning.effort if body.reasoning else None),
            tools=tools or None,
            drafts=bool(body.stream_options and body.stream_options.include_drafts),
        ),
    )
    answer = _Answer(service, body, job, conversation)
    events = answer.stream() if body.stream else None
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


def _sampling(body: ResponseRequest) -> Sampling:
    wanted = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wanted:
        raise invalid("top_logprobs", f'needs include to be ["{LOGPROBS}"]')
    if body.stream_options and not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    given = {
        "max_new_tokens": ("max_output_tokens", body.max_output_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p),
        "logprobs": ("top_logprobs", (body.top_logprobs or 0) if wanted else None),
    }
    return sampling(given, body.diffusion, prompt="input", stream=bool(body.stream))


def _tool(tool: FunctionTool) -> Json:
    """A function in the form that chats have."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _instructed(conversation: list[Json], instructions: str | None) -> list[Json]:
    """The conversation with this turn's instructions before it."""
    if not instructions:
        return conversation
    if conversation and conversation[0]["role"] == "system":
        content = f"{instructions}\n\n{conversation[0]['content']}"
        return [{"role": "system", "content": content}, *conversation[1:]]
    return [{"role": "system", "content": instructions}, *conversation]


class _Answer:
    """The answer to one request, in either form."""

    def __init__(self, service: Service, body: ResponseRequest, job: Job, conversation: list[Json]):
        self.service, self.body, self.job, self.conversation = service, body, job, conversation
        self.output = Output(service.words)
        self.number = 0
        reasoning = body.reasoning
        self.response: Json = {
            "id": render.new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": service.name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_echo(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def whole(self, results: list[Result]) -> Json:
        """The response; what a stream ends with is the same."""
        for _ in self.output.push(Growth().rest(results[0])):
            pass
        for _ in self.output.finish(self._status(results[0])):
            pass
        return self._ended(results[0])

    async def stream(self) -> AsyncIterator[str]:
        """The published events, in their order, and drafts between them where they were asked for."""
        yield self._event({"type": "response.created", "response": self.response})
        yield self._event({"type": "response.in_progress", "response": self.response})
        growth = Growth()
        async for _, event in self.job.events():
            if isinstance(event, Draft):
                draft = render.draft(event, 0, self.service.words)
                yield self._event({"type": "response.diffusion.draft", "diffusion": {"draft": draft}})
                continue
            for told in self.output.push(growth.take(event)):
                yield self._event(told)
        result = self.job.results[0]
        for told in self.output.finish(self._status(result)):
            yield self._event(told)
        response = self._ended(result)
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: ApiError) -> str:
        """The last event of a stream that fails."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {"status": "failed", "error": {"code": code, "message": error.message}, "output": self.output.items}
        return self._event({"type": "response.failed", "response": {**self.response, **failed}})

    def _event(self, event: Json) -> str:
        numbered = {"type": event["type"], "sequence_number": self.number, **event}
        self.number += 1
        return sse(numbered, event["type"])

    @staticmethod
    def _status(result: Result) -> str:
        return "incomplete" if result.finish_reason == "length" else "completed"

    def _ended(self, result: Result) -> Json:
        status = self._status(result)
        response = {
            **self.response,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self.output.items,
            "usage": self._usage(),
        }
        if self.response["store"]:
            self.service.store.put(response, [*self.conversation, self._message(result)])
        return response

    def _message(self, result: Result) -> Json:
        """The answer as a chat message, for the turns after it."""
        message: Json = {"role": "assistant", "content": result.text}
        if result.thoughts:
            message["reasoning_content"] = result.thoughts
        calls = [item for item in self.output.items if item["type"] == "function_call"]
        if calls:
            message["tool_calls"] = [
                {
                    "id": call["call_id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        return message

    def _usage(self) -> Json:
        counts = render.usage(self.job, self.service.words)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        }


def _echo(tool: FunctionTool) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }
