"""What the lines of an input mean: requests in OpenAI's batch format, or rows with a prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..protocol import ApiError, Call, read_call
from ..protocol.body import parse
from .source import MAX_LINE, Record
from .template import Template, as_text

log = logging.getLogger(__name__)
CHAT, COMPLETIONS = URLS = ("/v1/chat/completions", "/v1/completions")
FIELDS = ("custom_id", "method", "url", "body")
ROW_COLUMNS = ("input_line", "generated_text", "finish_reason", "prompt_tokens", "completion_tokens", "seed")
THOUGHTS = "thoughts"
MOST_ID = 512  # characters of a custom_id
# How OpenAI's bodies say what a sampling parameter says.
SPELLINGS = {
    "max_new_tokens": ("max_tokens", "max_completion_tokens"),
    "logprobs": ("logprobs", "top_logprobs"),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "stop": ("stop",),
    "logit_bias": ("logit_bias",),
}


class Refusal(Exception):
    """A line that cannot be a request, or a request that cannot be honoured.

    Fields:
        line, custom_id: which one it is; None where the line does not say.
        error: why.
        answered: whether it got as far as an endpoint, whose answer the error is.
    """

    def __init__(self, line: int, custom_id: str | None, error: ApiError, *, answered: bool = False):
        super().__init__(error.message)
        self.line, self.custom_id, self.error, self.answered = line, custom_id, error, answered


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, checked.

    Fields:
        data: the record that it was read from.
        row: the columns that its answer is put beside; None for OpenAI's format.
    """

    line: int
    data: bytes | dict[str, Any]
    custom_id: str | None
    call: Call
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """How records are read. It can be pickled, so that other machines read them alike.

    Fields:
        format: "openai" or "rows".
        run: names this run in the ids of its answers.
        model, any_model, url, prompt_column, template, system, think, raw, column_prefix: see `BatchSettings`.
        keep: whether answers are put beside the row's own columns, or stand by themselves.
        defaults: SamplingParams fields that are given.
        seed: the run's.
    """

    format: str
    run: str = ""
    model: str
    any_model: bool = False
    url: str | None = None
    prompt_column: str | None = None
    template: Template | None = None
    system: str | None = None
    think: bool = False
    raw: bool = False
    column_prefix: str = ""
    keep: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def answer_columns(self) -> list[str]:
        """Columns that an answer adds to its row."""
        return [f"{self.column_prefix}{name}" for name in (*ROW_COLUMNS, *((THOUGHTS,) if self.think else ()))]

    @property
    def input_columns(self) -> list[str]:
        """The columns that the prompts of rows are made of."""
        if self.template is not None:
            return list(self.template.columns)
        return [] if self.prompt_column is None else [self.prompt_column]

    def id_of(self, line: int) -> str:
        """The id of a line's answer: the same in every start of a run, and in every shard."""
        return f"batch_req_{self.run}{line:012d}"

    def line_of(self, answer: Mapping[str, Any]) -> int | None:
        """The line that an answer belongs to; None if it isn't one of this run."""
        if self.format == "rows":
            line = answer.get(self.answer_columns[0])
            return line if isinstance(line, int) and not isinstance(line, bool) and line > 0 else None
        name, start = answer.get("id"), f"batch_req_{self.run}"
        digits = name.removeprefix(start) if isinstance(name, str) and name.startswith(start) else ""
        return int(digits) if len(digits) == 12 and digits.isascii() and digits.isdecimal() else None

    def read(self, record: Record) -> Request:
        """The request that a record is.

        Raises:
            Refusal: it is none, or one that cannot be honoured.
        """
        try:
            return self._read(record)
        except Refusal:
            raise
        except Exception as error:  # one line is not to stop the others, whatever it has found
            log.warning("line %d: %s: %s", record.line, type(error).__name__, error)
            message = f"the line could not be read ({type(error).__name__})"
            raise _refusal(record.line, None, message, "internal_error") from None

    def _read(self, record: Record) -> Request:
        line, data = record
        if data is None:
            raise _refusal(line, None, f"the line is longer than {MAX_LINE >> 20} MiB", "line_too_long")
        try:
            value = parse(data) if isinstance(data, bytes) else data
        except ApiError as error:
            raise _refusal(line, None, error.message.replace("the body", "the line", 1), "invalid_json") from None
        if not isinstance(value, dict):
            raise _refusal(line, None, "the line is not a JSON object", "invalid_type")
        custom_id = _custom_id(line, value, required=self.format == "openai")
        url, body, row = (self._openai if self.format == "openai" else self._row)(line, custom_id, value)
        call = self._call(line, custom_id, url, body, row)
        return Request(line=line, data=data, custom_id=custom_id, call=call, row=row)

    def _openai(self, line: int, custom_id: str | None, value: dict[str, Any]) -> tuple[str, dict[str, Any], None]:
        for name in value:
            if name not in FIELDS:
                raise _refusal(line, custom_id, f"{name[:64]}: is not known", "unknown_parameter", name[:64])
        for name in FIELDS:
            if value.get(name) is None:
                raise _refusal(line, custom_id, f"{name}: is missing", "missing_required_parameter", name)
        if value["method"] != "POST":
            raise _refusal(line, custom_id, "method: needs to be POST", "invalid_value", "method")
        url, body = value["url"], value["body"]
        urls = URLS if self.url is None else (self.url,)
        if url not in urls:
            why = f"url: needs to be {' or '.join(urls)}"
            raise _refusal(line, custom_id, why, "invalid_url", "url")
        if not isinstance(body, dict):
            raise _refusal(line, custom_id, "body: needs to be a JSON object", "invalid_type", "body")
        return url, self._filled(body), None

    def _row(
        self, line: int, custom_id: str | None, row: dict[str, Any]
    ) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
        if self.keep:
            for name in self.answer_columns:
                if name in row:
                    why = f"{name}: a column that answers get; give them other names with column_prefix"
                    raise _refusal(line, custom_id, why, "invalid_value", name)
        try:
            if self.template is not None:
                prompt: Any = self.template.fill(row)
            else:
                assert self.prompt_column is not None
                prompt = row.get(self.prompt_column)
                prompt = prompt if isinstance(prompt, list) else as_text(row, self.prompt_column)
        except RequestError as error:
            name = str(error).split(":")[0]
            raise _refusal(line, custom_id, str(error), "missing_required_parameter", name) from None
        if isinstance(prompt, str) and not prompt.strip():
            raise _refusal(line, custom_id, "prompt: is empty", "invalid_value", self.prompt_column)
        body: dict[str, Any] = {"model": self.model, "diffusion": dict(self.defaults)}
        if self.raw:
            url, body["prompt"] = COMPLETIONS, prompt
        else:
            url = CHAT
            messages = [*map(_without_nulls, prompt)] if isinstance(prompt, list) else [_message("user", prompt)]
            body["messages"] = messages if self.system is None else [_message("system", self.system), *messages]
            if self.think:
                body["reasoning_effort"] = "medium"
        return url, body, row if self.keep else {}

    def _call(
        self, line: int, custom_id: str | None, url: str, body: dict[str, Any], row: Mapping[str, Any] | None
    ) -> Call:
        if self.any_model:
            body = {**body, "model": self.model}
        try:
            call = read_call(url, body)
            if row is not None and call.ask.answers != 1:
                raise ApiError(400, "prompt: needs to be one prompt a row", param="prompt", code="invalid_value")
            if call.stream:
                message = "stream: needs to be false; a batch has nobody to stream to"
                raise ApiError(400, message, param="stream", code="unsupported_value")
            if call.model != self.model:
                message = f"model: {str(call.model)[:200]!r} is not {self.model!r}, which this run has"
                raise ApiError(404, message, param="model", code="model_not_found")
        except ApiError as error:
            raise Refusal(line, custom_id, error, answered=row is None) from None
        return call.with_seed(seed_of(self.seed, f"id {custom_id}" if custom_id is not None else f"line {line}"))

    def _filled(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body with the run's settings for what it leaves open."""
        own = body.get("diffusion")
        if not self.defaults or not isinstance(own, dict | None):
            return body
        given = {
            name: value
            for name, value in self.defaults.items()
            if all(body.get(spelling) is None for spelling in SPELLINGS.get(name, ()))
        }
        return {**body, "diffusion": given | {name: value for name, value in (own or {}).items() if value is not None}}


def defaults_of(params: Any) -> dict[str, Any]:
    """The fields of SamplingParams that differ from their defaults, as JSON has them; without the seed."""
    given: dict[str, Any] = {}
    for own in dataclasses.fields(params):
        value = getattr(params, own.name)
        if own.name == "seed" or value == own.default:
            continue
        if own.name == "logit_bias":
            value = {str(token): bias for token, bias in value}
        given[own.name] = list(value) if isinstance(value, tuple) else value
    return given


def seed_of(seed: int, key: str) -> int:
    """A request's seed, from the run's and the request's key: 48 bits, which every reader of JSON keeps."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def duplicate(line: int, custom_id: str) -> Refusal:
    """A `custom_id` that an earlier line has."""
    return _refusal(line, custom_id, "custom_id: an earlier line has the same", "duplicate_custom_id", "custom_id")


def _refusal(line: int, custom_id: str | None, message: str, code: str, param: str | None = None) -> Refusal:
    return Refusal(line, custom_id, ApiError(400, message, param=param, code=code))


def _custom_id(line: int, value: Mapping[str, Any], *, required: bool) -> str | None:
    custom_id = value.get("custom_id")
    if custom_id is None and not required:
        return None
    if not required and isinstance(custom_id, int) and not isinstance(custom_id, bool):
        return str(custom_id)
    if custom_id is None:
        raise _refusal(line, None, "custom_id: is missing", "missing_required_parameter", "custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MOST_ID:
        message = f"custom_id: needs to be a text of 1 to {MOST_ID} characters"
        raise _refusal(line, None, message, "invalid_type", "custom_id")
    return custom_id


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _without_nulls(message: Any) -> Any:
    """Tables have every column in every row."""
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message
