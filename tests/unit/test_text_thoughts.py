"""Thoughts and answer apart, at every cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_detokenize import cuts, pieces

from dgemma.text import ChannelSplitter, split_thoughts

STRIP = ("<turn|>", "<|turn>", "<eos>", "<eos>>")
PARTS = ["<|channel>", "<channel|>", "thought", "thought\n", "\n", "<", "<|", ">", "a", " b", *STRIP, "<|tool_call>"]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("plain", None, "plain"),
        ("", None, ""),
        ("<|channel>thought\nI muse.\n<channel|>Answer", "I muse.", "Answer"),
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
        ("a <|tool_call>call:f{}<tool_call|>", None, "a <|tool_call>call:f{}<tool_call|>"),
        ("text with < and <| and <|channel", None, "text with < and <| and <|channel"),
        ("say thought\nand more", None, "say thought\nand more"),
    ],
)
@pytest.mark.parametrize("think", [True, False])
def test_split(text: str, thought: str | None, answer: str, think: bool):
    assert split_thoughts(text, think=think, strip=STRIP) == (thought, answer)


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
    assert split_thoughts(text) == (None, answer)


def test_bare_label_stays_when_thinking_is_on():
    assert split_thoughts("thought\nAnswer", think=True) == (None, "thought\nAnswer")


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
    splitter = ChannelSplitter(think=think, strip=STRIP)
    given_out = [*(splitter.push(piece) for piece in pieces(text, sizes)), splitter.finish()]
    result = "".join(thought for thought, _ in given_out), "".join(answer for _, answer in given_out)
    assert result == brute_split(text, think)
    assert split_thoughts(text, think=think, strip=STRIP) == (result[0].strip() or None, result[1])


def test_text_flows_as_it_comes():
    splitter = ChannelSplitter()
    assert splitter.push("<|channel>thought\nI mu") == ("I mu", "")
    assert splitter.push("se <chan") == ("se ", "")
    assert splitter.push("nel|>Ans") == ("", "Ans")
    splitter = ChannelSplitter()
    assert splitter.push("tho") == ("", "")
    assert splitter.push("rn") == ("", "thorn")
    assert splitter.push(" <") == ("", " ")
    assert splitter.push("b>") == ("", "<b>")
