"""`/v1/responses`: what a body asks for, and the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..events import Result
from . import render
from .ask import Ask
from .call import Answer, Call, Json
from .errors import invalid
from .fields import thinks
from .growth import Growth
from .items import Output, to_messages
from .responses_schema import LOGPROBS, FunctionTool, ResponseRequest
from .sampling import Sampling, sampling
from .served import Served

Earlier = Callable[[str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ResponseCall(Call):
    """A turn to answer. Fields: `conversation`, up to this turn's end, without its instructions."""

    body: ResponseRequest
    conversation: Sequence[Json]

    @classmethod
    def read(cls, body: ResponseRequest, earlier: Earlier | None = None) -> ResponseCall:
        """Checks what fields say together.

        Args:
            earlier: gives the conversation up to the end of a response of this id; None where none are kept.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        settings = _sampling(body)
        tools = [_tool(tool) for tool in body.tools or ()] if body.tool_choice != "none" else []
        if tools and body.parallel_tool_calls is False:
            raise invalid("parallel_tool_calls", "is not supported: how many calls the model makes is its own choice")
        before: list[Json] = []
        if body.previous_response_id is not None:
            if earlier is None:
                raise invalid("previous_response_id", "is not supported: no responses are kept", "unsupported_value")
            before = [dict(message) for message in earlier(body.previous_response_id)]
        conversation = before + to_messages(body.input)
        if not conversation:
            raise invalid("input", "holds no message")
        ask = Ask(
            prompts=[_instructed(conversation, body.instructions)],
            sampling=settings,
            think=thinks(body.reasoning.effort if body.reasoning else None),
            tools=tools or None,
            drafts=bool(body.stream_options and body.stream_options.include_drafts),
        )
        return cls(body=body, ask=ask, conversation=conversation)

    def begin(self, served: Served) -> ResponseAnswer:
        """See `Call`."""
        return ResponseAnswer(self, served)


class ResponseAnswer(Answer):
    """The answer to a turn.

    Fields:
        response: as it is before anything has come.
        output: its items, as they grow.
    """

    def __init__(self, call: ResponseCall, served: Served):
        super().__init__(call, served)
        body, reasoning = call.body, call.body.reasoning
        self.output = Output(served.words)
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
            "model": served.name,
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

    def whole(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """See `Answer`; what a stream ends with is the same."""
        for _ in self.output.push(Growth().rest(results[0])):
            pass
        for _ in self.output.finish(self.status(results[0])):
            pass
        return self.ended(results, prompt_tokens)

    @staticmethod
    def status(result: Result) -> str:
        """How the answer ended."""
        return "incomplete" if result.finish_reason == "length" else "completed"

    def ended(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """The response with all of its output."""
        status = self.status(results[0])
        return {
            **self.response,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self.output.items,
            "usage": self.usage(results, prompt_tokens),
        }

    def usage(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """See `Answer`, in this interface's words."""
        counts = super().usage(results, prompt_tokens)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        }

    def message(self, result: Result) -> Json:
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
    return sampling(given, body.diffusion, prompt="input")


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


def _echo(tool: FunctionTool) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }
