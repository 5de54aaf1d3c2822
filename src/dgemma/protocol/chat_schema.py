"""The request of `/v1/chat/completions`: every published field, honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .fields import (
    Body,
    Budget,
    Choices,
    Content,
    Diffusion,
    Effort,
    FunctionDefinition,
    FunctionName,
    LogitBias,
    Metadata,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
    TopLogprobs,
    TopP,
    cache_retention,
    no_cache_options,
    no_moderation,
    no_penalty,
    one_tier,
    one_verbosity,
    only,
    plain,
    text_format,
    unforced_tool_choice,
)

_NOT_SHOWN = {"index": True, "function": {"parsed_arguments"}}  # of a call
ROLES = ("developer", "system", "user", "assistant", "tool")


class FunctionCall(Body):
    """What a tool call calls."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = only(why="arguments is what the model is shown")


class ToolCall(Body):
    """A call that the assistant made in an earlier turn. `index`: its place, where it came out of a stream."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: Annotated[int, Field(ge=0)] | None = None


class SystemMessage(Body):
    """Instructions. Several at the start become one."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """What the model said, as this server gave it out; content may be left out beside `tool_calls`.

    `reasoning` is another name for `reasoning_content`. What is empty in OpenAI's own answers may be sent back.
    """

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: Any = only("", why="the model's refusals are content")
    audio: Any = only(why="the model has no voice")
    annotations: Any = only([], why="the model does not know them")
    function_call: Any = only(why="tool_calls takes its place")
    parsed: Any = only(why="content is what the model is shown")


class ToolMessage(Body):
    """What a called function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, Mapping) else getattr(value, "role", None)
    return f"~{'system' if role == 'developer' else role}" if role in ROLES else None


Message = Annotated[
    Annotated[SystemMessage, Tag("~system")]
    | Annotated[UserMessage, Tag("~user")]
    | Annotated[AssistantMessage, Tag("~assistant")]
    | Annotated[ToolMessage, Tag("~tool")],
    Discriminator(
        _role,
        custom_error_type="invalid_role",
        custom_error_message=f"needs to be one of {', '.join(ROLES)}",
    ),
]


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class TextFormat(Body):
    """The form of the answer: free text."""

    type: Literal["text"]


class ChatRequest(Body):
    """A chat. Fields that list nothing but null and a default are known and refused otherwise."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str
    diffusion: Diffusion | None = None
    logit_bias: LogitBias | None = None
    logprobs: bool | None = None
    max_completion_tokens: Budget | None = None
    max_tokens: Budget | None = None
    metadata: Metadata | None = None
    n: Choices | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: Effort | None = None
    safety_identifier: str | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    tools: list[Tool] | None = None
    top_logprobs: TopLogprobs | None = None
    top_p: TopP | None = None
    user: str | None = None

    audio: Any = only(why="the model has no voice")
    frequency_penalty: Any = no_penalty()
    function_call: Any = only("none", why="tool_choice takes its place")
    functions: Any = only([], why="tools takes its place")
    modalities: Any = only(["text"], why="the model writes text alone")
    moderation: Any = no_moderation()
    prediction: Any = only(why="there is no use for a guess of the answer")
    presence_penalty: Any = no_penalty()
    prompt_cache_options: Any = no_cache_options()
    prompt_cache_retention: Any = cache_retention()
    response_format: Any = text_format()
    service_tier: Any = one_tier()
    store: Any = only(False, why="chat completions are not stored")
    tool_choice: Any = unforced_tool_choice()
    verbosity: Any = one_verbosity()
    web_search_options: Any = only(why="this server does not search")


def to_prompt(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as the engine takes them: texts without parts, and the system messages at the start as one."""
    prompt: list[dict[str, Any]] = []
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": plain(message.content)}
        if message.role == "developer":
            entry["role"] = "system"
        for key in ("name", "tool_call_id", "reasoning", "reasoning_content"):
            if getattr(message, key, None) is not None:
                entry[key] = getattr(message, key)
        if getattr(message, "tool_calls", None):
            entry["tool_calls"] = [call.model_dump(exclude=_NOT_SHOWN) for call in message.tool_calls]
        prompt.append(entry)
    return merge_instructions(prompt)


def merge_instructions(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the system messages at the start as one, a blank line between them."""
    count = next((at for at, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    if count < 2:
        return prompt
    return [
        {"role": "system", "content": "\n\n".join(message["content"] for message in prompt[:count])},
        *prompt[count:],
    ]
