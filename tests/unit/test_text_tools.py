"""Tool calls: read at every cut, written back, never lost and never leaked; tools and calls of a request checked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_text_detokenize import cuts, pieces
from test_text_thoughts import joined
from text_fixtures import byte_level, gemma_like

import dgemma
from dgemma.errors import RequestError
from dgemma.text import Pieces, ReplySplitter, StreamDecoder, Tokenizer, check_tools, format_call

DEMO = Path(dgemma.__file__).parent / "demo"
Q = '<|"|>'
MARKS = ["<|tool_call>", "<tool_call|>", Q, "<|channel>", "<channel|>", "<turn|>", "<eos>"]
STRIP = ["<turn|>", "<eos>"]


def read(*texts: str, think: bool = False) -> Pieces:
    """All of an answer in these pieces."""
    return joined(ReplySplitter(think=think, strip=STRIP), list(texts))


def call_of(body: str) -> tuple[str, Any] | None:
    """Name and arguments of a call with this between its marks; None where it is no call and became text."""
    _, text, calls = read(f"<|tool_call>{body}<tool_call|>")
    if not calls:
        assert text
        return None
    assert not text and len(calls) == 1
    return calls[0].name, json.loads(calls[0].arguments)


@pytest.mark.parametrize(
    ("body", "name", "arguments"),
    [
        ("call:f{}", "f", {}),
        (
            f"call:get_weather{{city:{Q}Paris{Q},days:3,deep:{{a:[1,2.5,true,null]}}}}",
            "get_weather",
            {"city": "Paris", "days": 3, "deep": {"a": [1, 2.5, True, None]}},
        ),
        (
            'call:f{"city":"Paris", "deep": {"a": [1, -2.5e-3, false, null]}}',
            "f",
            {"city": "Paris", "deep": {"a": [1, -0.0025, False, None]}},
        ),
        (f"call:f{{{Q}a b{Q}:{Q}{Q}}}", "f", {"a b": ""}),
        (f'call:f{{a:{Q}x, }}]<tool_call|>\n<|channel>"y{Q}}}', "f", {"a": 'x, }]<tool_call|>\n<|channel>"y'}),
        ('call:f{a:"<|\\"|> <tool_call|>\n\\u00e9\\\\"}', "f", {"a": f"{Q} <tool_call|>\né\\"}),
        (f"call:f{{a:{Q}日本語 👩\u200d🚀{Q}}}", "f", {"a": "日本語 👩\u200d🚀"}),
        (" call : f {\n a : [ ] ,\tb : { } }\r\n", "f", {"a": [], "b": {}}),
        ("call:f{a:1,b:2,a:3}", "f", {"a": 3, "b": 2}),
        ("call:f{x-y.z_0:1,$top:2,größe:3}", "f", {"x-y.z_0": 1, "$top": 2, "größe": 3}),
        ("call:f{a:None}", "f", {"a": None}),
        ("call:google-mcp:files.create_2{}", "google-mcp:files.create_2", {}),
        ("call:f{n:123456789012345678901234567890}", "f", {"n": 123456789012345678901234567890}),
        ("call:f{a:" + "[" * 63 + "]" * 63 + "}", "f", {"a": eval("[" * 63 + "]" * 63)}),
    ],
)
def test_calls(body: str, name: str, arguments: dict[str, Any]):
    assert call_of(body) == (name, arguments)


@pytest.mark.parametrize(
    "body",
    [
        "f{}",
        "call f{}",
        "call:{}",
        "call:f",
        "call:f{",
        "call:f g{}",
        "call:f:{}",
        "call:é{}",
        f"call:{'x' * 129}{{}}",
        "call:f[]",
        "call:f{}}",
        "call:f{} and more",
        "call:f{a}",
        "call:f{a:}",
        "call:f{:1}",
        "call:f{a:b}",
        "call:f{a:True}",
        "call:f{a:'b'}",
        "call:f{a:1 2}",
        "call:f{a:1,}",
        "call:f{,}",
        "call:f{a:[1,]}",
        "call:f{a:[1}",
        "call:f{a=1}",
        "call:f(a=1)",
        "call:f{a:01}",
        "call:f{a:.5}",
        "call:f{a:NaN}",
        "call:f{a:-Infinity}",
        "call:f{a:1e999}",
        "call:f{n:" + "9" * 5000 + "}",
        'call:f{a:"\\x"}',
        'call:f{a:"\\ud83d"}',
        "call:f{a:<turn|>}",
        "call:f{a:" + "[" * 64 + "]" * 64 + "}",
        f"call:f{{a:{Q}b}}",
        'call:f{a:5" pipe}',
        'call:f{a:"b}',
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_what_is_no_call_becomes_text(body: str, closed: bool):
    """Without its marks and with nothing lost; what comes after is read as if it had not been there."""
    text = body
    for mark in MARKS:
        text = text.replace(mark, "")
    result = read(f"<|tool_call>{body}{'<tool_call|>' * closed}")
    assert result == ("", text, ())
    if closed:
        after = f"<|tool_call>call:g{{b:{Q}c{Q}}}<tool_call|> end"
        assert read(f"<|tool_call>{body}<tool_call|>{after}") == ("", text + " end", (("g", '{"b": "c"}'),))


def test_a_call_that_never_ends():
    assert read(f"a <|tool_call>call:f{{a:{Q}b <|channel>thought\nc<channel|>d") == ("c", "a call:f{a:b d", ())
    assert read("a <|tool_call>call:f{}") == ("", "a call:f{}", ())
    assert read("a <|tool_call>call:f{}<tool_cal") == ("", "a call:f{}<tool_cal", ())
    assert read("a <|tool_call><|tool_call>call:f{}<tool_call|>b") == ("", "a b", (("f", "{}"),))


def test_calls_and_the_label_line():
    call = "<|tool_call>call:f{}<tool_call|>"
    assert read(f"thought\n{call}a") == ("", "a", (("f", "{}"),))
    assert read(f"thought{call}\na") == ("", "thought\na", (("f", "{}"),))
    assert read(f"{call}thought\na") == ("", "thought\na", (("f", "{}"),))
    after = read(f"{call}<|channel>thought\na<channel|>thought\nb")
    assert after == ("a", "thought\nb", (("f", "{}"),))
    assert read("tho<|tool_call>ught\na") == ("", "a", ())


def test_pieces_come_as_soon_as_they_are_certain():
    splitter = ReplySplitter()
    assert splitter.push("Wait. <|tool_") == Pieces("", "Wait. ")
    assert splitter.push(f"call>call:f{{a:{Q}b{Q}}}") == Pieces()
    assert splitter.push("<tool_call|") == Pieces()
    assert splitter.push("> So") == Pieces("", " So", (("f", '{"a": "b"}'),))  # type: ignore[arg-type]
    assert splitter.push("<|tool_call>call:f{a: 5") == Pieces()
    assert splitter.push('" pipe and so on') == Pieces("", 'call:f{a: 5" pipe and so on')


# Independent truth: each way in which text is a call is turned into JSON by substitution, and Python reads that.
PIECE = re.compile(
    r'<\|"\|>(?P<string>.*?)<\|"\|>|(?P<json>"(?:[^"\\]|\\.)*")|'
    r"(?P<sign>[{}\[\],:])|(?P<space>[ \n]+)|(?P<word>[\w.+-]+)",
    re.DOTALL,
)


def brute_call(text: str) -> tuple[str, str, int] | None:
    """Name, arguments and length of the call that the text begins with: up to the first end at which it is one."""
    for end in re.finditer(r"<tool_call\|>", text):
        head = re.match(r"call:(\w+)\{", text[: end.start()])
        if not head:
            continue
        body, at, kinds = "", head.end() - 1, []
        while at < end.start() and (match := PIECE.match(text[: end.start()], at)):
            kind, value = match.lastgroup or "", match[match.lastgroup or 0]
            if kind == "string" or (
                kind == "word" and re.match(r"\s*:", text[match.end() :]) and kinds[-1:] in (["{"], [","])
            ):
                value = json.dumps(value)
            if kind != "space":
                kinds.append(value if kind == "sign" else kind)
            body, at = body + value, match.end()
        try:
            value = json.loads(body, strict=False)
        except ValueError:
            continue
        if at == end.start():
            return head[1], json.dumps(value, ensure_ascii=False), end.end()
    return None


def brute_read(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """What an answer of a thinking model says, mark by mark on the whole text."""
    thoughts: list[str] = []
    answer, calls, inside, at = "", [], False, 0
    while at < len(text):
        mark = next((mark for mark in MARKS if text.startswith(mark, at)), "")
        call = brute_call(text[at + len(mark) :]) if mark == MARKS[0] and not inside else None
        if call:
            calls.append(call[:2])
            at += call[2]
        elif mark == "<|channel>":
            inside = True
            thoughts.append("")
        elif mark == "<channel|>":
            inside = False
        elif not mark and inside:
            thoughts[-1] += text[at]
        elif not mark:
            answer += text[at]
        at += len(mark or "x")
    return "\n".join(filter(None, thoughts)), answer, calls


SOUP = [*MARKS, "<|tool_call>call:f{", "}<tool_call|>", "<|tool_call>call:f{a:1}<tool_call|>", "call:g{", "a:", "b:1"]
SOUP += [*'{}[]:,"c2\\ \n<', f"{Q}x{Q}", f"a:{Q}", '"y"', "true", "<tool", "|>", "é🙂"]
soups = st.lists(st.sampled_from(SOUP), max_size=12).map("".join)


@settings(max_examples=300)
@given(text=soups, sizes=cuts)
@example(f"<|tool_call>call:f{{a:{Q}}}<tool_call|><|tool_call>call:g{{b:{Q}x{Q}}}<tool_call|>", [3])
def test_any_soup_at_any_cut(text: str, sizes: list[int]):
    thoughts, answer, calls = joined(ReplySplitter(think=True, strip=STRIP), pieces(text, sizes))
    assert (thoughts, answer, [tuple(call) for call in calls]) == brute_read(text)


@settings(max_examples=10)
@given(text=soups.map(lambda text: text[:24]))
@example(f"a<|tool_call>call:f{{a:{Q}é{Q}}}<tool_call|>b")
@example("<|channel>thought\na<channel|>b<|tool_call>call:f{a:1<tool_call|>")
def test_every_cut_of_a_short_text(text: str):
    """All ways to cut it in two, all ways to cut it in three, and letter by letter."""
    for think in (True, False):
        whole = read(text, think=think)
        assert read(*text, think=think) == whole
        for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
            assert read(text[:first], text[first:second], text[second:], think=think) == whole


# No mark is put together from what these leave; a letter before keeps them from being a label line.
plain = st.text("abc .,:{}[]\"'\\\n日é🙂", max_size=8)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | plain
    | st.sampled_from(MARKS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | plain, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(st.text("ab_-.:é ", max_size=4) | st.sampled_from(MARKS), values, max_size=4)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,8}(:[a-z]{1,4})?", fullmatch=True)
segments = st.lists(
    st.tuples(st.just("text"), plain)
    | st.tuples(st.just("thought"), plain)
    | st.tuples(st.just("call"), names, objects)
    | st.tuples(st.just("broken"), st.sampled_from(["call:f{a:", "call:f(a=1)", "call:f{a:b}", "", "{", "call:"]))
    | st.tuples(st.just("mark"), st.sampled_from(["<tool_call|>", Q, "<turn|>", "<eos>", "<channel|>"])),
    max_size=6,
)


@given(name=names, arguments=objects)
def test_writing_and_reading_again(name: str, arguments: dict[str, Any]):
    text = format_call(name, arguments)
    assert read(text) == ("", "", ((name, json.dumps(arguments, ensure_ascii=False)),))


@settings(max_examples=100)
@given(parts=segments, sizes=cuts)
def test_answers_of_all_kinds(parts: list[Any], sizes: list[int]):
    """What is in them comes out where it belongs; no mark is in the text or in the thoughts."""
    text, answer, thoughts, calls = "", "", [], []
    for kind, *what in parts:
        if kind == "call":
            text += format_call(*what)
            calls.append((what[0], what[1]))
        elif kind == "thought":
            text += f"<|channel>thought\n{what[0]}<channel|>"
            thoughts += [what[0]] if what[0] else []
        elif kind == "broken":
            text += f"<|tool_call>{what[0]}<tool_call|>"
            answer += what[0]
        else:
            text += what[0]
            answer += what[0] if kind == "text" else ""
    result = joined(ReplySplitter(think=True, strip=STRIP), pieces(text, sizes))
    assert (result.thoughts, result.text) == ("\n".join(thoughts), answer)
    assert [(call.name, json.loads(call.arguments)) for call in result.calls] == calls
    assert not any(mark in result.text + result.thoughts for mark in MARKS)


def demo() -> Tokenizer:
    tokenizer = Tokenizer.read(DEMO)
    assert tokenizer is not None
    return tokenizer


def stream(tokenizer: Tokenizer, parts: list[list[int]]) -> Pieces:
    """What comes out of token ids that come in these parts."""
    decoder = StreamDecoder(tokenizer, keep_special=True)
    texts = [*map(decoder.push, parts), decoder.finish()]
    return joined(ReplySplitter(strip=tokenizer.controls), texts)


ARGUMENTS = {"city": "Zürich 日本", "who": ["👩\u200d🚀", 'a "q" <tool_call|>'], "n": -1.5, "größe": None}
ANSWER = (
    f"<|channel>thought\nHm 🙂.<channel|>Ich prüfe — {format_call('get_weather', ARGUMENTS)} 語<|tool_call>call:f{{é"
)


@pytest.mark.parametrize("family", [demo, gemma_like, byte_level])
def test_tokens_in_every_split(family: Callable[[], Tokenizer]):
    """Canvas edges fall anywhere: inside marks that are several tokens, inside the bytes of a character."""
    tokenizer = family()
    ids = tokenizer.encode(ANSWER)
    whole = stream(tokenizer, [ids])
    assert whole.thoughts == "Hm 🙂." and whole.text == "Ich prüfe —  語call:f{é"
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == [("get_weather", ARGUMENTS)]
    assert stream(tokenizer, [[token] for token in ids]) == whole
    for cut in range(1, len(ids)):
        assert stream(tokenizer, [ids[:cut], ids[cut:]]) == whole


@settings(max_examples=30)
@given(arguments=objects, sizes=cuts, data=st.data())
def test_any_arguments_through_the_demo_tokenizer(arguments: dict[str, Any], sizes: list[int], data: st.DataObject):
    """Also where the marks around and in them are spelled with ordinary tokens."""
    tokenizer = demo()
    ids = tokenizer.encode("a" + format_call("f", arguments), special=data.draw(st.booleans()))
    result = stream(tokenizer, pieces(ids, sizes))
    assert result == ("", "a", (("f", json.dumps(arguments, ensure_ascii=False)),))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("a b", {}, "name: 'a b'"),
        ("", {}, "name: ''"),
        ("f\n", {}, "name: 'f\\n'"),
        ("f", {"x": float("nan")}, "arguments: nan"),
        ("f", {"x": {1}}, "arguments: set"),
        ("f", {"x": {1: 2}}, "arguments: 1 is no key"),
        ("f", {"x": "\ud83d"}, "arguments: holds half"),
        ("f", {"\ud83d": 1}, "arguments: holds half"),
        ("f", {"x": eval("[" * 64 + "]" * 64)}, "arguments: nested deeper"),
    ],
)
def test_what_cannot_be_written(name: str, arguments: dict[str, Any], words: str):
    refused(lambda: format_call(name, arguments), words, kind=RequestError)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def test_tools_in_order():
    full = tool(description="d", parameters=SCHEMA, strict=False)
    assert check_tools([full]) == [full]
    assert check_tools([]) == []
    assert check_tools([tool(description=None, strict=None)]) == [tool()]
    assert check_tools([tool(parameters={})]) == [tool(parameters={"type": "object"})]
    assert check_tools([tool(), {"function": {"name": "g:h.i-j_2"}}])[1] == tool(name="g:h.i-j_2")


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({"type": "function"}, "tools: needs a list"),
        ("f", "tools: needs a list"),
        (["f"], "tools[0]: needs an object with type, function"),
        ([tool(), {"type": "function"}], "tools[1].function: needs an object"),
        ([{"type": "web_search"}], "tools[0].type: 'web_search' is not supported"),
        ([{"type": "function", "name": "f"}], "tools[0].name: unknown key"),
        ([tool(name=None)], "tools[0].function.name: None"),
        ([tool(name="two words")], "tools[0].function.name: 'two words'"),
        ([tool(name="<|turn>")], "tools[0].function.name: '<|turn>'"),
        ([tool(name="f" * 129)], "tools[0].function.name: 'fff"),
        ([tool(), tool()], "tools[1].function.name: 'f' is there twice"),
        ([tool(description=3)], "tools[0].function.description: needs a text"),
        ([tool(returns={})], "tools[0].function.returns: unknown key"),
        ([tool(strict=True)], "tools[0].function.strict: True is not supported yet"),
        ([tool(strict="no")], "tools[0].function.strict: 'no'"),
        ([tool(parameters=[])], "tools[0].function.parameters: needs a JSON schema"),
        ([tool(parameters={"type": "string"})], "tools[0].function.parameters.type: arguments are an object"),
        ([tool(parameters={"properties": []})], "tools[0].function.parameters.properties: needs an object"),
        ([tool(parameters={"required": "city"})], "tools[0].function.parameters.required: needs a list"),
        ([tool(parameters={"required": [1]})], "tools[0].function.parameters.required: needs a list"),
        ([tool(parameters={"default": float("inf")})], "tools[0].function.parameters: inf"),
    ],
)
def test_tools_out_of_order(tools: Any, words: str):
    refused(lambda: check_tools(tools), words, kind=RequestError)
