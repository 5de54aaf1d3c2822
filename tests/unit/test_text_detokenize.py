"""Streamed text is never taken back and adds up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import ALPHABET, CONTROLS, FAMILIES, byte_level, gemma_like

from dgemma.text import StopStrings, StreamDecoder, Tokenizer

Family = Callable[[], Tokenizer]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
texts = st.lists(st.sampled_from([*ALPHABET, *CONTROLS, "hello"]), max_size=60).map("".join) | st.text(max_size=60)
cuts = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def pieces(whole: Any, sizes: list[int]) -> list[Any]:
    """The whole cut into pieces of these sizes, over and over."""
    result, start, turn = [], 0, 0
    while start < len(whole):
        result.append(whole[start : start + sizes[turn % len(sizes)]])
        start += sizes[turn % len(sizes)]
        turn += 1
    return result


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], keep_special: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, keep_special=keep_special)
    return [*(decoder.push(piece) for piece in pieces(ids, sizes)), decoder.finish()]


@each_family
@given(text=texts, sizes=cuts, keep=st.booleans(), special=st.booleans())
def test_pieces_add_up(family: Family, text: str, sizes: list[int], keep: bool, special: bool):
    tokenizer = family()
    ids = tokenizer.encode(text, special=special)
    given_out = stream(tokenizer, ids, sizes, keep)
    assert "".join(given_out) == tokenizer.decode(ids, keep_special=keep)


@each_family
@given(data=st.data(), sizes=cuts, keep=st.booleans())
def test_any_ids_at_all_add_up(family: Family, data: st.DataObject, sizes: list[int], keep: bool):
    """A canvas may hold anything: half characters, stray bytes, control tokens in between, unknown ids."""
    tokenizer = family()
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 3), max_size=120))
    assert "".join(stream(tokenizer, ids, sizes, keep)) == tokenizer.decode(ids, keep_special=keep)


@each_family
def test_long_streams_add_up_token_by_token(family: Family):
    tokenizer = family()
    ids = tokenizer.encode("naïve 日本語 👩\u200d🚀 hello    world\n\n\n" * 40)
    decoder = StreamDecoder(tokenizer)
    text = ""
    for token in ids:
        text += decoder.push([token])
        assert len(decoder._window) < 100  # the cost of a step doesn't grow
    assert text + decoder.finish() == tokenizer.decode(ids)


@each_family
def test_no_replacement_character_that_a_later_byte_would_mend(family: Family):
    tokenizer = family()
    decoder = StreamDecoder(tokenizer)
    seen = [decoder.push([token]) for token in tokenizer.encode("a🙂b語")]
    assert "\ufffd" not in "".join(seen)
    assert "".join(seen) + decoder.finish() == "a🙂b語"


def test_bytes_that_never_become_a_character_are_shown_when_that_is_certain():
    tokenizer = byte_level()
    ids = tokenizer.encode("🙂", special=False)[:1] + tokenizer.encode("hello")
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(ids[:1]) == ""
    assert decoder.push(ids[1:]) == tokenizer.decode(ids)
    decoder.push(ids[:1])
    assert decoder.finish() == "\ufffd"


def test_a_run_of_byte_tokens_waits_for_its_end():
    """One bad byte turns all characters of the run into replacement characters."""
    tokenizer = gemma_like()
    euro = tokenizer.encode("€")
    bad = tokenizer.id_of("<0xFF>")
    assert len(euro) == 3 and bad is not None
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(euro) == ""
    assert decoder.push([bad]) == ""
    assert decoder.finish() == tokenizer.decode([*euro, bad]) == "\ufffd" * 4
    assert decoder.push(euro) + decoder.push(tokenizer.encode("a")) == "€a"


def test_text_comes_at_once_where_it_is_certain():
    tokenizer = gemma_like()
    decoder = StreamDecoder(tokenizer)
    for token in tokenizer.encode("hello world"):
        assert decoder.push([token]) == tokenizer.decode([token])


def brute_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The first stop string to be complete, letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text(alphabet="ab<", max_size=14)


@settings(max_examples=300)
@given(text=letters, stops=st.lists(st.text(alphabet="ab<", max_size=4), max_size=4), sizes=cuts)
def test_stop_strings_match_brute_force_at_every_cut(text: str, stops: list[str], sizes: list[int]):
    matcher = StopStrings(stops)
    emitted, stopped = "", False
    for piece in pieces(text, sizes):
        emit, stopped = matcher.push(piece)
        emitted += emit
        assert stopped == matcher.stopped
    assert (emitted + matcher.finish(), stopped) == brute_stop(text, stops)


def test_stop_strings_hold_back_only_what_may_begin_one():
    matcher = StopStrings(["END", "\n\n"])
    assert matcher.push("some E") == ("some ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("\n") == ("EN", False)
    assert matcher.push("x") == ("\nx", False)
    assert matcher.push("yEND and more") == ("y", True)
    assert matcher.push("more") == ("", True) and matcher.finish() == ""
