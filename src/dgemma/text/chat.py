"""Chat messages to a prompt by the checkpoint's own template, safe from control tokens in what people wrote."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, RequestError
from .tokenizer import Tokenizer, read_tokenizer_config

FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_PRIVATE = range(0xF0000, 0x10FFFE)  # private-use characters: no text means anything by them

Message = Mapping[str, Any]


class ChatTemplate:
    """A checkpoint's chat template: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    It runs in jinja2's sandbox with what templates expect of transformers: `raise_exception`, `strftime_now`,
    `tojson` that keeps letters as they are, `break` and `continue`, and the special tokens by name (`bos_token`).
    """

    def __init__(self, source: str, *, variables: Mapping[str, Any] | None = None, path: Path | str = FILE):
        self.path = path
        self._variables = dict(variables or {})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{path}: line {error.lineno}: {_line(error)}") from None

    @classmethod
    def read(cls, directory: Path) -> ChatTemplate | None:
        """Reads the directory's template; None where it has none.

        Raises:
            CheckpointError: the template or `tokenizer_config.json` is damaged; the message names the file.
        """
        settings = read_tokenizer_config(directory)
        path = Path(directory) / FILE
        if path.is_file():
            try:
                source: object = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: not readable as UTF-8 text ({_line(error)})") from None
        else:
            path = Path(directory) / "tokenizer_config.json"
            source = settings.get("chat_template")
            if isinstance(source, list):  # several, by name
                named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
                source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{path}: chat_template: not a text")
        return cls(source, variables=_special_tokens(settings), path=path)

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text. What people wrote is in it as it is; to get token ids use `encode`, which is safer.

        Args:
            messages: checked with `check_messages` first.
            think: whether the model may think before it answers (`enable_thinking` in the template).
            tools: functions that the model may call, in OpenAI's form.
            add_generation_prompt: whether the model's turn is opened at the end.

        Raises:
            RequestError: the messages are not in order, or the template refuses them.
            CheckpointError: the template does what the sandbox forbids.
        """
        check_messages(messages, last=add_generation_prompt)
        return self._render(messages, think=think, tools=tools, add_generation_prompt=add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        think: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as token ids, in which control tokens come from the template alone.

        A message that spells out `<turn|>` keeps those characters, as text, and its turn goes on: a private character
        breaks up every control token in the messages and tools while the template runs, and the prompt is encoded
        piece by piece between those. Arguments and errors are those of `render`.
        """
        check_messages(messages, last=add_generation_prompt)
        breaks = _Breaks(tokenizer, [messages, tools])
        prompt = self._render(
            breaks.mark(messages), think=think, tools=breaks.mark(tools), add_generation_prompt=add_generation_prompt
        )
        return breaks.encode(prompt)

    def _render(self, messages: Any, *, think: bool, tools: Any, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                {**self._variables, "messages": messages, "tools": tools, "enable_thinking": think},
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.exceptions.SecurityError as error:
            raise CheckpointError(f"{self.path}: {_line(error)}") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"messages: the chat template refuses them: {_line(error)}") from None


def check_messages(messages: Sequence[Message], *, last: bool = True) -> None:
    """Refuses messages that no template could make sense of.

    Each is `{"role": system|user|assistant|tool, "content": str}`; an assistant's may have `tool_calls` and then no
    content. A system message comes first. With `last`, the last one is a user's or a tool's: someone waits for an
    answer.

    Raises:
        RequestError: names the message, as `messages[2].content`.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages: needs a list with at least one message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: needs an object with role and content, not {type(message).__name__}")
        for key in message:
            if key not in _KEYS:
                raise RequestError(f"{where}.{key}: unknown key (known: {', '.join(sorted(_KEYS))})")
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
        if role == "system" and index:
            raise RequestError(f"{where}.role: a system message comes first")
        if message.get("tool_calls") is not None:
            if role != "assistant":
                raise RequestError(f"{where}.tool_calls: only an assistant's message has them")
            if not isinstance(message["tool_calls"], list):
                raise RequestError(f"{where}.tool_calls: needs a list")
        content = message.get("content")
        silent = content is None and role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not silent:
            raise RequestError(f"{where}.content: needs a text, not {type(content).__name__}")
    if last and messages[-1]["role"] not in ("user", "tool"):
        raise RequestError(f"messages[{len(messages) - 1}].role: the last message must be a user's or a tool's")


class _Breaks:
    """Marks a break inside every control token that people wrote; no token is read across a break."""

    def __init__(self, tokenizer: Tokenizer, written: object):
        self._tokenizer = tokenizer
        texts = list(_texts(written))
        # A break after the first letter: nothing else is left to break a token of one letter, and none is known.
        found = [c for c in tokenizer.controls if len(c) > 1 and any(c in text for text in texts)]
        used = {character for text in texts for character in text if ord(character) >= _PRIVATE.start}
        self._break = next(chr(code) for code in _PRIVATE if chr(code) not in used)
        # Looking ahead finds tokens that overlap, too.
        pattern = f"(?=(?:{'|'.join(map(re.escape, found))}))(.)"
        self._pattern = re.compile(pattern, re.DOTALL) if found else None

    def mark(self, written: Any) -> Any:
        """A copy with the breaks in it."""
        pattern = self._pattern
        if pattern is None:
            return written
        return _map_texts(written, lambda text: pattern.sub(lambda match: match[1] + self._break, text))

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt that was rendered from marked texts."""
        parts = [prompt] if self._pattern is None else prompt.split(self._break)
        return [token for part in parts if part for token in self._tokenizer.encode(part)]


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects, keys of objects too (a tool's arguments are named by them)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and objects with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and the like from `tokenizer_config.json`, either spelling."""
    result: dict[str, str] = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            result[key] = text
    return result


def _to_json(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes for HTML and non-ASCII letters; a prompt is neither.
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
