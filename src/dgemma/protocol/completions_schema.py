"""The request of `/v1/completions`: every published field, honoured or refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from .fields import (
    Body,
    Budget,
    Choices,
    Diffusion,
    LogitBias,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
    TopLogprobs,
    TopP,
    no_penalty,
    only,
)

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _as_prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts out of the four ways to write them."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    good = isinstance(value, list) and value
    if good and (all(isinstance(one, str) and one for one in value) or all(map(_is_ids, value))):
        return value
    why = "needs a text, a list of texts, a list of token ids, or a list of lists of token ids; none of them empty"
    raise PydanticCustomError("invalid_value", "{why}", {"why": why})


Prompts = Annotated[
    list[Any],
    BeforeValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(Body):
    """Text to go on with, without a chat template."""

    model: str
    prompt: Prompts
    diffusion: Diffusion | None = None
    best_of: Annotated[Choices | None, Field(description="The same as `n`, or 1.")] = None
    logit_bias: LogitBias | None = None
    logprobs: TopLogprobs | None = None
    max_tokens: Budget | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    user: str | None = None

    echo: Any = only(False, why="the answer holds what is new alone")
    frequency_penalty: Any = no_penalty()
    presence_penalty: Any = no_penalty()
    suffix: Any = only("", why="text after the answer is not known to the model")
