"""Thoughts and answer apart, at every cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_detokenize import brute_stop, cuts, pieces

from dgemma.text import Pieces, ReplySplitter

STRIP = ("<turn|>", "<|turn>", "<eos>", "<eos>>", "<|tool_call>", "<tool_call|>", '<|"|>')
PARTS = ["<|channel>", "<channel|>", "thought", "thought\n", "\n", "<", "<|", ">", "a", " b", *STRIP]


def joined(splitter: ReplySplitter, texts: list[str]) -> Pieces:
    """All that a splitter gives out for an answer in pieces."""
    given_out = [*map(splitter.push, texts), splitter.finish()]
    return Pieces(
        "".join(some.thoughts for some in given_out),
        "".join(some.text for some in given_out),
        tuple(call for some in given_out for call in some.calls),
    )


def split(text: str, think: bool = False) -> tuple[str | None, str]:
    """A whole answer's thoughts, None where there are none, and text."""
    thoughts, answer, _ = joined(ReplySplitter(think=think, strip=STRIP), [text])
    return thoughts or None, answer


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("plain", None, "plain"),
        ("", None, ""),
        ("<|channel>thought\nI muse.\n<channel|>Answer", "I muse.\n", "Answer"),
        ("<|channel>thought\n<channel|>Answer", None, "Answer"),
        ("<|channel>thought<channel|>Answer", None, "Answer"),
        ("<|channel><channel|>Answer", None, "Answer"),
        ("<|channel>thought\nI mus", "I mus", ""),
        ("<|channel>thou", None, ""),
        ("<|channel>", None, ""),
        ("<|chan", None, "<|chan"),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", "a\nc", "bd"),
        ("<|channel>thought\na<channel|><|channel>thought\n<channel|>d", "a", "d"),
        ("<|channel>thought\na<|channel>thought\nb<channel|>c", "a\nb", "c"),
        ("<|channel>thoughtful\nx<channel|>y", "thoughtful\nx", "y"),
        ("<|channel>plan\nx<channel|>y", "plan\nx", "y"),
        ("<|channel>thou<channel|>y", "thou", "y"),
        ("x<channel|>y", None, "xy"),
        ("a<turn|>b<eos>", None, "ab"),
        ("<|channel>thought\na<turn|>b<channel|>c<|turn>", "ab", "c"),
        ('a <|"|>b<|"|> c <tool_call|>', None, "a b c "),
        ('<|channel>thought\nI <|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|><channel|>b', "I call:f{x:y}", "b"),
        ("text with < and <| and <|channel", None, "text with < and <| and <|channel"),
        ("say thought\nand more", None, "say thought\nand more"),
    ],
)
@pytest.mark.parametrize("think", [True, False])
def test_split(text: str, thought: str | None, answer: str, think: bool):
    assert split(text, think) == (thought, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("thought\nAnswer", "Answer"),
        ("thought\n", ""),
        ("thought", "thought"),
        ("thoughts\nAnswer", "thoughts\nAnswer"),
        ("thou", "thou"),
        ("thought\nthought\nAnswer", "thought\nAnswer"),
        ("thought\n<channel|>Answer", "Answer"),
        ("thought<channel|>Answer", "Answer"),
        ("<|channel>thought\n<channel|>thought\nAnswer", "Answer"),
        ("Answer\nthought\n", "Answer\nthought\n"),
    ],
)
def test_bare_label_when_thinking_is_off(text: str, answer: str):
    assert split(text) == (None, answer)


def test_bare_label_stays_when_thinking_is_on():
    assert split("thought\nAnswer", think=True) == (None, "thought\nAnswer")


def brute_split(text: str, think: bool) -> tuple[str, str]:
    """The rules on the whole text: cut at marks, then look at each stretch."""
    thoughts, answer, label_seen = [], "", think
    inside, current = False, ""
    marks = sorted(["<|channel>", "<channel|>", *STRIP], key=len, reverse=True)
    stretches: list[tuple[bool, str, str]] = []  # in a channel, its text, the mark after it
    at = 0
    while at < len(text):
        mark = next((mark for mark in marks if text.startswith(mark, at)), None)
        if mark is None:
            current += text[at]
        elif mark not in STRIP:
            stretches.append((inside, current, mark))
            inside, current = mark == "<|channel>", ""
        at += len(mark or "x")
    stretches.append((inside, current, ""))
    for in_channel, content, mark in stretches:
        if in_channel:
            if content == "thought" or (not mark and "thought".startswith(content)):
                content = ""
            content = content.removeprefix("thought\n")
            if content:
                thoughts.append(content)
            continue
        if content and not label_seen:
            label_seen = True
            if content == "thought" and mark == "<channel|>":
                content = ""
            content = content.removeprefix("thought\n")
        answer += content
    return "\n".join(thoughts), answer


@settings(max_examples=300)
@given(text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join), sizes=cuts, think=st.booleans())
def test_every_cut_gives_the_same(text: str, sizes: list[int], think: bool):
    result = joined(ReplySplitter(think=think, strip=STRIP), pieces(text, sizes))
    assert result == (*brute_split(text, think), ())


def test_text_flows_as_it_comes():
    splitter = ReplySplitter()
    assert splitter.push("<|channel>thought\nI mu") == Pieces("I mu")
    assert splitter.push("se <chan") == Pieces("se ")
    assert splitter.push("nel|>Ans") == Pieces("", "Ans")
    splitter = ReplySplitter()
    assert splitter.push("tho") == Pieces()
    assert splitter.push("rn") == Pieces("", "thorn")
    assert splitter.push(" <") == Pieces("", " ")
    assert splitter.push("b>") == Pieces("", "<b>")


@settings(max_examples=300)
@given(
    text=st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    stops=st.lists(st.text("abtho<\n", max_size=3), max_size=3),
    sizes=cuts,
)
def test_a_stop_string_ends_all(text: str, stops: list[str], sizes: list[int]):
    result = joined(ReplySplitter(strip=STRIP, stops=stops), pieces(text, sizes))
    assert result == joined(ReplySplitter(strip=STRIP, stops=stops), [text])
    thoughts, answer = brute_split(text, False)
    assert result.text == brute_stop(answer, stops)[0]
    assert thoughts.startswith(result.thoughts)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_what_comes_after_a_stop_string(size: int):
    answer = "<|channel>thought\na<channel|>b END c<|channel>thought\nd<channel|><|tool_call>call:f{}<tool_call|>END"
    splitter = ReplySplitter(stops=["END"])
    assert joined(splitter, pieces(answer, [size])) == ("a", "b ", ())
    assert splitter.stopped and splitter.push("more") == Pieces()
    splitter = ReplySplitter(stops=["END"])
    assert joined(splitter, pieces(answer.replace("END", "<|tool_call>call:f{}<tool_call|>EN", 1), [size])) == (
        "a\nd",
        "b EN c",
        (("f", "{}"), ("f", "{}")),
    )
    label = ReplySplitter(stops=["thought"])
    assert joined(label, pieces("thought<|tool_call>call:f{}<tool_call|>", [size])) == ("", "", ())
