"""The looks of a canvas, its rows, its window and its caption, without any terminal."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from fake_model import END, STORY, FakeModel, FakeTokenizer

from dgemma.cli.canvas import (
    GUESS_NATS,
    NOISE,
    Cell,
    Look,
    Pieces,
    caption,
    cells,
    columns,
    sparkline,
    window,
    wrap,
)
from dgemma.cli.terminal import in_ascii, visible
from dgemma.events import Draft


def draft(tokens: Sequence[int], entropies: Sequence[float], step: int = 3, **given: object) -> Draft:
    length = len(tokens)
    fields = {
        "canvas": 0,
        "step": step,
        "max_steps": 48,
        "tokens": list(tokens),
        "text": "",
        "settled": [entropy < 0.1 for entropy in entropies],
        "changed": [False] * length,
        "entropies": list(entropies),
        "mean_entropy": sum(entropies) / max(1, length),
        "tokens_per_forward": 5.5,
    }
    return Draft(**{**fields, **given})  # type: ignore[arg-type]


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


def flat(content: Sequence[Cell]) -> str:
    return "".join(cell.text for cell in content)


def test_looks(tokenizer: FakeTokenizer) -> None:
    tokens = tokenizer.encode("one two three four five six")
    made = cells(
        draft(tokens, [0.0, 0.0, 0.5, 1.0, 3.0, 9.0], changed=[False, True, False, True, False, True]),
        Pieces(tokenizer, [END]),
    )
    assert [cell.look for cell in made] == [
        Look.SETTLED, Look.REVISED, Look.GUESS, Look.LOW, Look.MIDDLE, Look.HIGH,
    ]  # fmt: skip
    assert [cell.text for cell in made] == ["one", " two", " three", " ····", " ░░░░", " ▒▒▒"]


def test_nothing_is_revised_in_the_first_step(tokenizer: FakeTokenizer) -> None:
    tokens = tokenizer.encode("one two")
    made = cells(draft(tokens, [0.0, 0.5], step=1, changed=[True, True]), Pieces(tokenizer))
    assert [cell.look for cell in made] == [Look.SETTLED, Look.GUESS]


def test_what_follows_a_sure_end_is_hidden(tokenizer: FakeTokenizer) -> None:
    one, two = tokenizer.encode("one two")
    pieces = Pieces(tokenizer, [END])
    sure = draft([one, END, two, END], [0.0, 0.01, 5.0, 0.0])
    assert flat(cells(sure, pieces)) == "one"
    unsure = draft([one, END, two, END], [0.0, 3.0, 0.0, GUESS_NATS / 2])
    assert flat(cells(unsure, pieces)) == "one░ two"


def test_a_finished_draft_reads_as_its_text() -> None:
    model = FakeModel(STORY, canvas=400)
    drafts = [event for event in model.stream("hi") if isinstance(event, Draft)]
    assert flat(cells(drafts[-1], Pieces(model.tokenizer, model.end_token_ids))) == STORY


def test_bytes_of_one_character_are_put_together(tokenizer: FakeTokenizer) -> None:
    tokens = tokenizer.encode("a🦊é")
    assert Pieces(tokenizer).split(tokens) == ["a", "🦊", "", "", "", "é", ""]
    # A byte is missing: its neighbours must not be lost with it.
    assert Pieces(tokenizer).split(tokens[:3] + tokens[5:]) == ["a", "▯", "▯", "é", ""]


def test_control_characters_become_pictures(tokenizer: FakeTokenizer) -> None:
    tokens = tokenizer.encode("a\x1b[2J\x07\n\tb")
    assert "".join(Pieces(tokenizer).split(tokens)) == "a␛[2J␇\n\tb"
    assert visible("\x9b31m\x7f\r\nx\r\u202ey") == "\ufffd31m␡\nx␍\ufffdy"


def test_rows_are_those_of_a_terminal() -> None:
    rows = wrap([Cell("abcdef\n", Look.SETTLED), Cell("海海海\tx", Look.WRITTEN)], 5)
    assert [["".join(text for text, _ in row)] for row in rows] == [["abcde"], ["f"], ["海海"], ["海   "], ["x"]]


def test_rows_in_words() -> None:
    text = "the quick brown fox jumpsoverthelazydog and rests"
    rows = ["".join(part for part, _ in row) for row in wrap([Cell(text, Look.WRITTEN)], 12, words=True)]
    assert all(len(row) <= 12 for row in rows)
    assert [row.rstrip() for row in rows][:2] == ["the quick", "brown fox"]
    assert "".join("".join(rows).split()) == "".join(text.split())


def test_the_space_before_a_revised_word_is_not_marked() -> None:
    assert wrap([Cell(" two", Look.REVISED)], 20) == [[(" ", Look.SETTLED), ("two", Look.REVISED)]]


@pytest.mark.parametrize("width", [1, 2, 3, 7, 20, 80])
@pytest.mark.parametrize("words", [False, True])
def test_no_row_is_too_wide_and_nothing_is_lost(width: int, words: bool) -> None:
    rng = random.Random(width)
    for _ in range(60):
        text = "".join(rng.choice("ab  é\n\t海🦊-") for _ in range(rng.randrange(120)))
        half = rng.randrange(len(text) + 1)
        rows = wrap([Cell(text[:half], Look.SETTLED), Cell(text[half:], Look.HIGH)], width, words=words)
        for row in rows:
            joined = "".join(part for part, _ in row)
            assert columns(joined) <= max(width, 2)  # a wide character in one column cannot be helped
        shown = "".join(part for row in rows for part, _ in row)
        assert "".join(shown.split()) == "".join(text.split())


def rows_of(states: str) -> list[list[tuple[str, Look]]]:
    return [[(state, Look.HIGH if state == "n" else Look.SETTLED)] for state in states]


@pytest.mark.parametrize("height", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("states", ["sssss", "snsssnsss", "nnnnnnnnnnnn", "ssssssssssss", "sssssssssssn"])
def test_window(states: str, height: int) -> None:
    rows = rows_of(states)
    shown = window(rows, height)
    assert shown.above + len(shown.rows) + shown.below == len(rows)
    assert shown.rows == rows[shown.above : shown.above + len(shown.rows)]
    if len(rows) <= height:
        assert shown.rows == rows
    elif height >= 3:
        assert len(shown.rows) + bool(shown.above) + bool(shown.below) == height
        focus = states.index("n") if "n" in states else len(states) - 1
        assert shown.above <= focus < shown.above + len(shown.rows)


@pytest.mark.parametrize("width", range(1, 100, 7))
def test_caption_fits(width: int) -> None:
    line = caption(draft([1], [0.5]), width, 12.34, [3.0, 2.0, 0.5])
    assert columns(line) <= width


def test_caption_at_full_width() -> None:
    line = caption(draft([1], [0.5]), 80, 12.34, [2.0, 0.5])
    assert line == "canvas 1 · step 3/48 · 0.50 nats █▅ · 5.5 tokens/forward · 12.3 s"


def test_sparkline() -> None:
    assert sparkline([4.0, 1.0, 0.0]) == "█▅▁"
    assert sparkline([0.0]) == "▁"
    assert len(sparkline(range(100))) == 12


def test_ascii_signs() -> None:
    assert in_ascii("".join(NOISE.values()) + "▯⋮█").isascii()
