"""The request of `/v1/responses`: every published field, honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .fields import (
    Body,
    Budget,
    Diffusion,
    Effort,
    FunctionName,
    Metadata,
    Temperature,
    TopLogprobs,
    TopP,
    cache_retention,
    no_cache_options,
    no_moderation,
    no_padding,
    not_strict,
    one_tier,
    one_verbosity,
    only,
    text_format,
    unforced_tool_choice,
)

LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]


def no_async() -> Any:
    """`async` of a function and of a call."""
    return only(False, why="a call is answered before the model goes on", alias="async")


class InputText(Body):
    """Text among the parts of a message; images, sounds and files are refused by `type`."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: Any = only([], why="the model does not know them")
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Any = no_cache_options()


def _kind_of_content(value: Any) -> str:
    return "~parts" if isinstance(value, list) else "~text"


ItemContent = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[InputText], Tag("~parts"), Field(min_length=1)],
    Discriminator(_kind_of_content),
]


class MessageItem(Body):
    """A message, from a person or as this server gave it out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    id: str | None = None
    status: Status | None = None
    phase: Any = only(why="the model does not tell comments from answers")


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Status | None = None
    caller: Any = only(why="functions are called by the model alone")
    namespace: Any = only(why="functions have no namespaces here")
    is_async: Any = no_async()


class OutputItem(Body):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent
    id: str | None = None
    name: str | None = None
    status: Status | None = None
    caller: Any = only(why="functions are called by the model alone")
    namespace: Any = only(why="functions have no namespaces here")


class ReasoningItem(Body):
    """What the model thought, as this server gave it out."""

    type: Literal["reasoning"]
    summary: list[InputText]
    content: list[InputText] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: Any = only(why="thoughts are given out as they are")


ITEMS = {"message": "message", "function_call": "call", "function_call_output": "output", "reasoning": "reasoning"}


def _kind(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"~{ITEMS[kind]}" if isinstance(kind, str) and kind in ITEMS else None


Item = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[CallItem, Tag("~call")]
    | Annotated[OutputItem, Tag("~output")]
    | Annotated[ReasoningItem, Tag("~reasoning")],
    Discriminator(
        _kind, custom_error_type="invalid_item", custom_error_message=f"needs to be one of {', '.join(ITEMS)}"
    ),
]


def _kind_of_input(value: Any) -> str:
    return "~items" if isinstance(value, list) else "~text"


Input = Annotated[
    Annotated[str, Tag("~text"), Field(min_length=1)] | Annotated[list[Item], Tag("~items"), Field(min_length=1)],
    Discriminator(_kind_of_input),
]


class FunctionTool(Body):
    """A function that the model may call; other tools are refused by `type`."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Any = not_strict()
    allowed_callers: Any = only(["direct"], why="functions are called by the model alone")
    defer_loading: Any = only(False, why="every tool is in the prompt")
    output_schema: Any = only(why="results are not checked")
    is_async: Any = no_async()


class Reasoning(Body):
    """How much the model thinks: `none` and `minimal` not at all, everything else as it likes."""

    effort: Effort | None = None
    summary: Any = only("auto", why="thoughts are given out as they are")
    generate_summary: Any = only("auto", why="thoughts are given out as they are")
    context: Any = only("auto", why="the chat template decides what it shows of them")
    mode: Any = only("standard", why="there is one mode")


class TextOptions(Body):
    """The form of the answer: free text."""

    format: Any = text_format()
    verbosity: Any = one_verbosity()


class ResponseStreamOptions(Body):
    """What a stream holds besides the published events."""

    include_obfuscation: Any = no_padding()
    include_drafts: bool | None = Field(None, description="Send the canvas after every denoising step.")


class ResponseRequest(Body):
    """One turn. Fields that list nothing but null and a default are known and refused otherwise."""

    input: Input
    model: str | None = None
    diffusion: Diffusion | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    instructions: str | None = None
    max_output_tokens: Budget | None = None
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Temperature | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    top_logprobs: TopLogprobs | None = None
    top_p: TopP | None = None
    user: str | None = None

    access_programs: Any = only(why="there are none")
    background: Any = only(False, why="an answer is made while its client waits")
    background_options: Any = only(why="an answer is made while its client waits")
    context_management: Any = only([], why="conversations are not shortened")
    conversation: Any = only(why="previous_response_id takes its place")
    image: Any = only(why="images are not read yet")
    max_tool_calls: Any = only(why="this server calls no tools of its own")
    moderation: Any = no_moderation()
    prompt: Any = only(why="prompt templates are not kept here")
    prompt_cache_options: Any = no_cache_options()
    prompt_cache_retention: Any = cache_retention()
    service_tier: Any = one_tier()
    tool_choice: Any = unforced_tool_choice()
    truncation: Any = only("disabled", why="conversations are not shortened")
