"""`/v1/chat/completions`: what a body asks for, and the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..events import Result
from . import render
from .ask import Ask
from .call import Answer, Call, Json
from .chat_schema import ChatRequest, to_prompt
from .errors import invalid
from .fields import thinks
from .sampling import Sampling, sampling
from .served import Served


@dataclass(frozen=True, kw_only=True)
class ChatCall(Call):
    """A conversation to answer."""

    body: ChatRequest

    @classmethod
    def read(cls, body: ChatRequest) -> ChatCall:
        """Checks what fields say together.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        settings = _sampling(body)
        options = body.stream_options
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        if tools and body.parallel_tool_calls is False:
            raise invalid("parallel_tool_calls", "is not supported: how many calls the model makes is its own choice")
        ask = Ask(
            prompts=[to_prompt(body.messages)],
            sampling=settings,
            choices=body.n or 1,
            think=thinks(body.reasoning_effort),
            tools=tools or None,
            drafts=bool(options and options.include_drafts),
        )
        return cls(body=body, ask=ask)

    def begin(self, served: Served) -> ChatAnswer:
        """See `Call`."""
        return ChatAnswer(self, served)


class ChatAnswer(Answer):
    """The answer to a conversation. Fields: `head`, what every chunk of it begins with."""

    def __init__(self, call: ChatCall, served: Served):
        super().__init__(call, served)
        body = call.body
        self.head: Json = {
            "id": render.new_id("chatcmpl-"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        if body.service_tier:
            self.head["service_tier"] = "default"
        if body.metadata and not body.stream:
            self.head["metadata"] = body.metadata

    def whole(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """See `Answer`."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self.head, "choices": choices, "usage": self.usage(results, prompt_tokens)}

    def _choice(self, index: int, result: Result) -> Json:
        message: Json = {"role": "assistant", "content": result.text, "refusal": None}
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
    return sampling(given, body.diffusion, prompt="messages")
