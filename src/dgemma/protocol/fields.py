"""What the request schemas of the endpoints share: strict bodies, refused fields, stop strings, tools, `diffusion`.

pydantic checks the shape of a request here and writes the same as JSON Schema into `/openapi.json`; ranges of sampling
settings are `SamplingParams`' own business.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from ..params import MOST_BIAS, MOST_LOGPROBS, SamplingParams

MOST_CHOICES = 16
MOST_STOPS = 4
LATER = "constrained output is not in this server yet"


class Body(BaseModel):
    """A JSON object: no unknown keys, and no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


@dataclass(frozen=True)
class Only:
    """A published field that this server cannot honour: the values that ask for nothing pass, others are refused.

    `null` always passes. `why` says what is missing.
    """

    allowed: tuple[Any, ...]
    why: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The check."""
        return handler.generate_schema(Annotated[Any, BeforeValidator(self.check)])

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """The values that pass."""
        return {"enum": [*self.allowed, None], "description": f"Nothing else is honoured: {self.why}."}

    def check(self, value: Any) -> Any:
        """The value, if it asks for nothing.

        Raises:
            PydanticCustomError: it asks for something.
        """
        # 0 == False and 1 == True: a number is not a truth value.
        if value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.allowed
        ):
            return value
        raise PydanticCustomError("unsupported_value", "{why}", {"why": f"is not supported: {self.why}"})


def only(*allowed: Any, why: str, alias: str | None = None) -> Any:
    """The default of a field (of type `Any`) that may only have these values, or null."""
    field: Any = Field(None, alias=alias)
    field.metadata.append(Only(allowed, why))
    return field


def _kind_of_content(value: Any) -> str:
    return "~parts" if isinstance(value, list) else "~text"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for token in value:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise PydanticCustomError("invalid_value", "{why}", {"why": "its keys are token ids, as text"})
    return {int(token): bias for token, bias in value.items()}


_STRING = {"type": "string", "minLength": 1}
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING, "maxItems": MOST_STOPS}]}),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]],
    BeforeValidator(_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
        }
    ),
]
Budget = Annotated[int, Field(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def no_penalty() -> Any:
    """`frequency_penalty`, `presence_penalty`."""
    return only(0, why="the sampler of a canvas has no penalties")


def no_cache_options() -> Any:
    """`prompt_cache_options`, `prompt_cache_breakpoint`."""
    return only(why="prompts are cached as they come, without settings")


def cache_retention() -> Any:
    """`prompt_cache_retention`."""
    return only("in_memory", why="the prompt cache is in memory and lasts as long as there is room")


def no_moderation() -> Any:
    """`moderation`."""
    return only(why="nothing is moderated here")


def one_tier() -> Any:
    """`service_tier`."""
    return only("auto", "default", why="there is one service tier")


def one_verbosity() -> Any:
    """`verbosity`."""
    return only("medium", why="the model has no setting for it")


def not_strict() -> Any:
    """`strict` of a function."""
    return only(False, why=LATER)


def unforced_tool_choice() -> Any:
    """`tool_choice`."""
    return only("auto", "none", why=f'"required" and named functions need it, and {LATER}')


def text_format() -> Any:
    """`response_format`, `text.format`."""
    return only({"type": "text"}, why=LATER)


def no_padding() -> Any:
    """`include_obfuscation`."""
    return only(False, why="chunks are not padded")


def thinks(effort: str | None) -> bool:
    """Whether a reasoning effort lets the model think; it knows no levels. Left out, it does not."""
    return effort not in (None, "none", "minimal")


class TextPart(Body):
    """Text among the parts of a message; images, sounds and files are refused by `type`."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = no_cache_options()


Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[TextPart], Tag("~parts"), Field(min_length=1)],
    Discriminator(_kind_of_content),
]


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Any = not_strict()


class StreamOptions(Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Any = no_padding()
    include_drafts: bool | None = Field(None, description="Send the canvas after every denoising step.")


def plain(content: str | list[Any] | None) -> str | None:
    """The text of a message's content: its parts joined."""
    return "".join(part.text for part in content) if isinstance(content, list) else content


def _settings() -> type[Body]:
    """`diffusion`: a field a sampling parameter, so that a new one is here at once. Null is as good as left out."""
    hints = typing.get_type_hints(SamplingParams)
    plain_types = {"stop": Stop, "stop_token_ids": list[int], "logit_bias": LogitBias}
    known: dict[str, Any] = {
        field.name: (plain_types.get(field.name, hints[field.name]) | None, None)
        for field in dataclasses.fields(SamplingParams)
    }
    return create_model("Diffusion", __base__=Body, __doc__="Sampling settings by this project's names.", **known)


if TYPE_CHECKING:
    Diffusion = Body
else:
    Diffusion = _settings()
