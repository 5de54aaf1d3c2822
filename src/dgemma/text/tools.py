"""Tool calls: out of a model's text as it grows and back into it; and the checks of tools and calls in a request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Generator, Mapping
from typing import Any, NamedTuple

from ..errors import RequestError

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64  # objects and lists in one another
_NAME = re.compile(r"(?=.{1,128}\Z)[A-Za-z0-9_.-]+(?::[A-Za-z0-9_.-]+)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_.-]+")
_SPACE = re.compile(r"[ \t\r\n]*+")
_WORD = re.compile(r"""[^\s{}\[\],:<>"']*+""")
_QUOTED = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # of a JSON string, what is between its quotes
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

_Kinds = tuple[str, ...]
_KIND_OF = {QUOTE: "string", '"': "string", CLOSE: "close", **{sign: sign for sign in "{}[],:"}}
_KEY: _Kinds = ("word", "string")
_VALUE: _Kinds = ("word", "string", "[", "{")


class Call(NamedTuple):
    """A function that the model asks to be called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class MalformedCall(Exception):
    """What follows `<|tool_call>` is not a call."""


class _Token(NamedTuple):
    """A piece of a call: `kind` is "word", "string", "close" or one of the signs `{}[],:`."""

    kind: str
    value: str


class CallReader:
    """Reads one call as its text grows: what follows `<|tool_call>`, `<tool_call|>` included.

    A call reads `call:NAME{key:value,…}`. Keys are bare or strings. Values are strings, numbers, `true`, `false`,
    `null` (or `None`, as Gemma's chat template prints it), lists and objects. A string stands between two `<|"|>`
    and may hold everything else, `<tool_call|>` too, or is a JSON string in ordinary quotes. Of a key that comes twice
    the last value counts. White space between the pieces doesn't matter.
    """

    def __init__(self) -> None:
        self.text = ""  # all that was pushed
        self._at = self._seen = 0  # where the next piece begins, and how far that has been read
        self._parser = _call()
        self._kinds = next(self._parser)

    @property
    def rest(self) -> str:
        """What has not been read; once the call is whole, the text after it."""
        return self.text[self._at :]

    def push(self, text: str) -> Call | None:
        """Takes the next piece; returns the call once it is whole.

        Raises:
            MalformedCall: no text that follows could make it a call.
        """
        self.text += text
        while (token := self._token()) is not None:
            try:
                self._kinds = self._parser.send(token)
            except StopIteration as done:
                call: Call = done.value
                return call
        return None

    def _token(self) -> _Token | None:
        """The next piece of the call; None while it may still go on."""
        text = self.text
        self._at = _end(_SPACE, text, self._at)
        opening = next((opening for opening in _KIND_OF if text.startswith(opening, self._at)), "")
        begun = text[self._at : self._at + len(CLOSE)]
        if not opening and any(mark.startswith(begun) for mark in (QUOTE, CLOSE)):
            return None
        kind = _KIND_OF.get(opening, "word")
        if kind not in self._kinds:  # said before its end is there: what is no call waits no longer than it must
            raise MalformedCall
        start = end = self._at + len(opening)
        whole = True
        if opening == QUOTE:
            found = text.find(QUOTE, max(start, self._seen - len(QUOTE) + 1))
            whole = found >= 0
            end = found if whole else len(text)
        elif opening == '"':
            end = _end(_QUOTED, text, max(start, self._seen))
            whole = text.startswith('"', end)
        elif kind == "word":
            end = _end(_WORD, text, max(start, self._seen))
            whole = end < len(text)
            if end == start:
                raise MalformedCall
        self._seen = end
        if not whole:
            return None
        self._at = end + (len(opening) if kind == "string" else 0)
        return _Token(kind, _unescaped(text[start:end]) if opening == '"' else text[start:end])


# The parser is recursive and waits where text is missing: it yields the kinds of token that may come next, and is sent
# the token once that is there.


def _call() -> Generator[_Kinds, _Token, Call]:
    """Parses a call."""
    if (yield ("word",)).value != "call":
        raise MalformedCall
    yield (":",)
    name = (yield ("word",)).value
    while (token := (yield (":", "{"))).kind == ":":
        name += ":" + (yield ("word",)).value
    if not _NAME.fullmatch(name):
        raise MalformedCall
    arguments = yield from _value(token, 1)
    yield ("close",)
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # NaN, or a number beyond all bounds
        raise MalformedCall from None
    if _HALF_CHARACTER.search(text):
        raise MalformedCall
    return Call(name, text)


def _value(token: _Token, depth: int) -> Generator[_Kinds, _Token, Any]:
    """Parses the value that begins with this token."""
    if token.kind == "string":
        return token.value
    if token.kind == "word":
        return _scalar(token.value)
    if depth > MAX_DEPTH:
        raise MalformedCall
    if token.kind == "[":
        items: list[Any] = []
        token = yield (*_VALUE, "]")
        while token.kind != "]":
            items.append((yield from _value(token, depth + 1)))
            token = yield (",", "]")
            if token.kind == ",":
                token = yield _VALUE
        return items
    keyed: dict[str, Any] = {}
    token = yield (*_KEY, "}")
    while token.kind != "}":
        key = token.value
        yield (":",)
        keyed[key] = yield from _value((yield _VALUE), depth + 1)
        token = yield (",", "}")
        if token.kind == ",":
            token = yield _KEY
    return keyed


def _scalar(word: str) -> Any:
    """A number, truth value or null."""
    try:
        return None if word == "None" else json.loads(word)
    except ValueError:
        raise MalformedCall from None


def _unescaped(text: str) -> str:
    """The value of what stands in a JSON string; models may write line ends in it as they are."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        raise MalformedCall from None


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the pattern, which may match nothing, ends."""
    match = pattern.match(text, start)
    return match.end() if match else start


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it, marks included: `<|tool_call>call:f{city:<|"|>Paris<|"|>,days:3}<tool_call|>`.

    Reading it gives the same name and arguments. A text that holds `<|"|>` is written as a JSON string.

    Raises:
        RequestError: the name is none that a function can have, or the arguments are not JSON.
    """
    _check_name(name, "name")
    _check_json(arguments, "arguments")
    return f"{OPEN}call:{name}{_spelled(arguments)}{CLOSE}"


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if QUOTE in value else QUOTE + value + QUOTE
    if isinstance(value, Mapping):
        keys = [key if _BARE_KEY.fullmatch(key) else _spelled(key) for key in value]
        pairs = zip(keys, value.values(), strict=True)
        return "{" + ",".join(f"{key}:{_spelled(item)}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spelled, value)) + "]"
    return json.dumps(value)


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Checks the functions that a request offers; returns them in the form that chat templates read.

    Each is `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`, where `parameters` is
    a JSON schema of an object. A field that is null counts as left out.

    Raises:
        RequestError: names the place, as `tools[1].function.name`.
    """
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools: needs a list of functions, not {type(tools).__name__}")
    result: list[dict[str, Any]] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = _function(fields(tool, where, ("type", "function")), where, _TOOL_FIELDS)
        where += ".function"
        if function["name"] in names:
            raise RequestError(f"{where}.name: {function['name']!r} is there twice")
        names.add(function["name"])
        if not isinstance(function.get("description", ""), str):
            raise RequestError(f"{where}.description: needs a text, not {type(function['description']).__name__}")
        if function.get("strict", False) is not False:
            raise RequestError(f"{where}.strict: {function['strict']!r} is not supported yet (only false)")
        if "parameters" in function:
            function["parameters"] = _schema(function["parameters"], f"{where}.parameters")
        result.append({"type": "function", "function": function})
    return result


def check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Checks the calls of an assistant's message; returns them with their arguments as objects.

    Each is `{"id": str, "type": "function", "function": {"name": str, "arguments": JSON object as text}}`. Arguments
    that are an object already stay one.

    Raises:
        RequestError: names the place below `where`, as `messages[2].tool_calls[0].function.arguments`.
    """
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where}: needs a list of calls, not {type(calls).__name__}")
    result: list[dict[str, Any]] = []
    for index, item in enumerate(calls):
        place = f"{where}[{index}]"
        call = fields(item, place, ("id", "type", "function"))
        function = _function(call, place, ("name", "arguments"))
        if not isinstance(call.get("id"), str) or not call["id"]:
            raise RequestError(f"{place}.id: needs a text, by which a tool's message says what it answers")
        if any(call["id"] == other["id"] for other in result):
            raise RequestError(f"{place}.id: {call['id']!r} is there twice")
        function["arguments"] = _arguments(function.get("arguments"), f"{place}.function.arguments")
        result.append({"id": call["id"], "type": "function", "function": function})
    return result


def fields(value: object, where: str, known: Collection[str]) -> dict[str, Any]:
    """What an object of a request says; a field that is null counts as left out.

    Raises:
        RequestError: it is not an object, or it has a field that is not among the known ones.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: needs an object with {', '.join(known)}; not {type(value).__name__}")
    given = {key: item for key, item in value.items() if item is not None}
    for key in given:
        if key not in known:
            raise RequestError(f"{where}.{key}: unknown key (known: {', '.join(known)})")
    return given


_TOOL_FIELDS = ("name", "description", "parameters", "strict")


def _function(item: Mapping[str, Any], where: str, known: Collection[str]) -> dict[str, Any]:
    """The function of a tool or of a call."""
    if item.get("type", "function") != "function":
        raise RequestError(f"{where}.type: {item['type']!r} is not supported (only 'function')")
    function = fields(item.get("function"), f"{where}.function", known)
    _check_name(function.get("name"), f"{where}.function.name")
    return function


def _schema(value: object, where: str) -> dict[str, Any]:
    """Parameters with their type, which templates rely on."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: needs a JSON schema of an object, not {type(value).__name__}")
    _check_json(value, where)
    schema = {"type": "object", **value}
    if schema["type"] != "object":
        raise RequestError(f"{where}.type: arguments are an object, not {schema['type']!r}")
    if not isinstance(schema.get("properties", {}), Mapping):
        raise RequestError(f"{where}.properties: needs an object")
    required = schema.get("required", [])
    if not isinstance(required, list | tuple) or not all(isinstance(key, str) for key in required):
        raise RequestError(f"{where}.required: needs a list of names")
    return schema


def _arguments(value: object, where: str) -> dict[str, Any]:
    """Arguments as an object, whichever way they are given."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: needs a JSON object, not {type(value).__name__}")
    _check_json(value, where)
    return dict(value)


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where}: {name!r} is not 1 to 128 letters, digits and the signs _ - . :")


def _check_json(value: object, where: str, depth: int = 0) -> None:
    """Refuses what JSON cannot say, and what is too deep for whoever reads it recursively."""
    if isinstance(value, str):
        if _HALF_CHARACTER.search(value):
            raise RequestError(f"{where}: holds half of a surrogate pair, which is no character")
    elif isinstance(value, Mapping | list | tuple):
        if depth == MAX_DEPTH:
            raise RequestError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        items = list(value)
        if isinstance(value, Mapping):
            for key in items:
                if not isinstance(key, str):
                    raise RequestError(f"{where}: {key!r} is no key of a JSON object")
            items += value.values()
        for item in items:
            _check_json(item, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{where}: {value} is not a JSON number")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise RequestError(f"{where}: {type(value).__name__} is not JSON")
