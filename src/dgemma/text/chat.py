"""Chat messages to a prompt by the checkpoint's own template, safe from control tokens in what people wrote."""

from __future__ import annotations

import datetime
import functools
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
from .tools import check_calls, check_tools, fields, format_call

FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")
_THOUGHTS = ("reasoning_content", "reasoning")  # two names for the same
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *_THOUGHTS)
_ROLE_OF = {"tool_calls": "assistant", "tool_call_id": "tool"} | dict.fromkeys(_THOUGHTS, "assistant")
_PRIVATE = range(0xF0000, 0x10FFFE)  # private-use characters: no text means anything by them

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]


class ChatTemplate:
    """A checkpoint's chat template: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    It runs in jinja2's sandbox with what templates expect of transformers: `raise_exception`, `strftime_now`,
    `tojson` that keeps letters as they are, `break` and `continue`, and the special tokens by name (`bos_token`);
    beyond that with `format_call`. What a request says and the template leaves out is refused: tools, calls, their
    answers and names must each change the prompt. Only thoughts may be left out: templates drop those of earlier turns,
    as the models were trained.
    """

    def __init__(self, source: str, *, variables: Mapping[str, Any] | None = None, path: Path | str = FILE):
        self.path = path
        self._variables = dict(variables or {})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["format_call"] = format_call
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
            messages: see `check_messages`.
            think: whether the model may think before it answers (`enable_thinking` in the template).
            tools: functions that the model may call, see `check_tools`.
            add_generation_prompt: whether the model's turn is opened at the end.

        Raises:
            RequestError: the messages or tools are not in order, or the template refuses them or has no place for them.
            CheckpointError: the template does what the sandbox forbids.
        """
        checked = check_messages(messages, last=add_generation_prompt)
        return self._prompt(
            checked,
            check_tools([] if tools is None else tools),
            think=think,
            add_generation_prompt=add_generation_prompt,
        )

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
        checked = check_messages(messages, last=add_generation_prompt)
        functions = check_tools([] if tools is None else tools)
        breaks = _Breaks(tokenizer, [checked, functions])
        prompt = self._prompt(
            breaks.mark(checked), breaks.mark(functions), think=think, add_generation_prompt=add_generation_prompt
        )
        return breaks.encode(prompt)

    def _prompt(self, messages: Messages, tools: Tools, *, think: bool, add_generation_prompt: bool) -> str:
        """Renders, and makes sure that nothing is silently left out."""
        render = functools.partial(self._render, think=think, add_generation_prompt=add_generation_prompt)
        prompt = render(messages, tools)
        for place, what, other_messages, other_tools in _variants(messages, tools):
            try:
                left_out = render(other_messages, other_tools) == prompt
            except RequestError:  # it matters so much that the template fails without it
                left_out = False
            if left_out:
                raise RequestError(f"{place}: this model's chat template has no place for {what}")
        return prompt

    def _render(self, messages: Messages, tools: Tools, *, think: bool, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                {**self._variables, "messages": messages, "tools": tools or None, "enable_thinking": think},
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.exceptions.SecurityError as error:
            raise CheckpointError(f"{self.path}: {_line(error)}") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"messages: the chat template refuses them: {_line(error)}") from None


def _variants(messages: Messages, tools: Tools) -> Iterator[tuple[str, str, Messages, Tools]]:
    """Other conversations: without the tools, without the calls, with other answers to them, with other names; of each
    its place and what it is about."""
    if tools:
        yield "tools", "them", messages, []
    calling = [index for index, message in enumerate(messages) if "tool_calls" in message]
    if calling:
        less = [{key: item for key, item in message.items() if key != "tool_calls"} for message in messages]
        yield f"messages[{calling[0]}].tool_calls", "them", less, tools
    answering = [index for index, message in enumerate(messages) if message["role"] == "tool"]
    if answering:
        other = [{**message, "content": message["content"] + "x"} for message in messages]
        other = [new if new["role"] == "tool" else old for new, old in zip(other, messages, strict=True)]
        yield f"messages[{answering[0]}].content", "a tool's answer", other, tools
    for role in ("system", "user", "assistant"):
        named = [at for at, message in enumerate(messages) if message["role"] == role and message.get("name")]
        if named:
            other = [{**message, "name": message.get("name", "") + "x"} for message in messages]
            other = [new if at in named else old for at, (new, old) in enumerate(zip(other, messages, strict=True))]
            yield f"messages[{named[0]}].name", f"a name of the {role}", other, tools


def check_messages(messages: Sequence[Message], *, last: bool = True) -> Messages:
    """Refuses messages that no template could make sense of; returns them in the form that templates read.

    Each is an object in OpenAI's form: `role` system (or developer, which is the same), user, assistant or tool, and
    `content`, a text or a list of `{"type": "text", "text": str}`, which are joined. A field that is null counts as
    left out. A system message comes first. An assistant's message may have `tool_calls` (see `check_calls`) and then
    no content; a tool's message for each of them follows, with its `tool_call_id`. With `last`, the last message is a
    user's or a tool's: someone waits for an answer.

    What comes back has a text as content, calls with their arguments as objects, the function's name in a tool's
    message, and thoughts by both of their names (`reasoning_content`, `reasoning`).

    Raises:
        RequestError: names the place, as `messages[2].content`.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages: needs a list with at least one message")
    result: Messages = []
    waiting: dict[str, tuple[str, str]] = {}  # calls without an answer: id to place and function
    for index, given in enumerate(messages):
        where = f"messages[{index}]"
        message = fields(given, where, _KEYS)
        role = _role(message, where, first=not index)
        calls = check_calls(message.pop("tool_calls", []), f"{where}.tool_calls")
        if role == "tool":
            message["name"] = _answered(message, waiting, where)
        else:
            _all_answered(waiting)
        content = _content(message.get("content", "" if calls else None), f"{where}.content")
        thoughts = message.get("reasoning_content", message.get("reasoning"))
        # Some templates know the one name, some the other.
        told = {} if thoughts is None else dict.fromkeys(_THOUGHTS, thoughts)
        result.append({**message, **told, "role": role, "content": content})
        if calls:
            result[-1]["tool_calls"] = calls
            for number, call in enumerate(calls):
                waiting[call["id"]] = f"{where}.tool_calls[{number}]", call["function"]["name"]
    if last:
        if result[-1]["role"] not in ("user", "tool"):
            raise RequestError(f"messages[{len(result) - 1}].role: the last message must be a user's or a tool's")
        _all_answered(waiting)
    return result


def _role(message: Mapping[str, Any], where: str, *, first: bool) -> str:
    """The message's role, and whether it fits the other fields."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    if role == "system" and not first:
        raise RequestError(f"{where}.role: a system message comes first")
    for key, owner in _ROLE_OF.items():
        if key in message and role != owner:
            raise RequestError(f"{where}.{key}: only {owner} messages have it")
    for key in ("name", *_THOUGHTS):
        if not isinstance(message.get(key, ""), str):
            raise RequestError(f"{where}.{key}: needs a text, not {type(message[key]).__name__}")
    if len({message[key] for key in _THOUGHTS if key in message}) > 1:
        raise RequestError(f"{where}.reasoning: is the same as reasoning_content; give one of them")
    return str(role)


def _answered(message: Mapping[str, Any], waiting: dict[str, tuple[str, str]], where: str) -> str:
    """The function that a tool's message answers; its call waits no longer."""
    call = message.get("tool_call_id")
    if not isinstance(call, str) or call not in waiting:
        raise RequestError(f"{where}.tool_call_id: no call before it waits for an answer to {call!r}")
    _, name = waiting.pop(call)
    if message.get("name", name) != name:
        raise RequestError(f"{where}.name: {message['name']!r} is not the function that was called, {name!r}")
    return name


def _all_answered(waiting: Mapping[str, tuple[str, str]]) -> None:
    if waiting:
        call, (place, _) = next(iter(waiting.items()))
        raise RequestError(f"{place}: no tool message answers it (tool_call_id {call!r})")


def _content(content: object, where: str) -> str:
    """A message's text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where}: needs a text, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise RequestError(f"{place}.type: {kind} is not supported yet")
        text = fields(part, place, ("type", "text")).get("text")
        if not isinstance(text, str):
            raise RequestError(f"{place}.text: needs a text, not {type(text).__name__}")
        texts.append(text)
    return "".join(texts)


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
