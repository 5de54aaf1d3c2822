"""The live canvas and the conversation on a terminal, as a person would see them."""

from __future__ import annotations

import re
import sys
import time

import pytest

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from fake_model import STORY
from screen import Terminal

SLOW = "0.08"


def prompted(terminal: Terminal) -> bool:
    """Whether the conversation waits for the next message."""
    return terminal.text.splitlines()[-1:] == [">"]


def joined(text: str) -> str:
    """Text without white space: a terminal breaks lines where it must."""
    return "".join(text.split())


def test_the_canvas_settles_and_leaves_the_answer() -> None:
    with Terminal("generate", "hi", FAKE_DELAY=SLOW) as terminal:
        terminal.wait("step 3/48")
        assert "░" in terminal.text and "Once upon" in terminal.text
        assert "nats" in terminal.text and "tokens/forward" in terminal.text
        terminal.wait("canvas 2 · step 4/48")
        assert terminal.text.startswith("Once upon a time")  # committed text reads on into the canvas
        assert terminal.finish() == 0
        *answer, figures = terminal.text.splitlines()
        assert joined("".join(answer)) == joined(STORY)
        assert figures.startswith("133 tokens · 9 + 9 + 9 steps") and figures.endswith("seed 11")
        assert not terminal.screen.cursor.hidden


def test_every_draft_is_seen_for_a_moment_however_fast_the_model_is() -> None:
    with Terminal("generate", "hi") as terminal:
        terminal.wait("canvas 1")
        begun = time.monotonic()
        assert terminal.finish() == 0
        assert time.monotonic() - begun > 25 * 0.04
        seen = {match for frame in terminal.frames for match in re.findall(r"canvas (\d) · step (\d)/48", frame)}
        assert len(seen) >= 20


@pytest.mark.parametrize("piped", ["", "stdout"])
def test_early_text_is_shown_once(piped: str) -> None:
    """While a canvas is drawn its first words stand in it alone, and in the end the answer has them once."""
    flags = ("--early-text", "eager", "--watch")
    with Terminal("generate", "hi", *flags, piped=piped, FAKE_DELAY=SLOW) as terminal:
        terminal.wait("canvas 2 · step 8/48")
        if not piped:
            frames = [joined(frame) for frame in terminal.frames]
            assert max(frame.count("Onceuponatime") for frame in frames) == 1
        assert terminal.finish() == 0
        text = terminal.read_piped() if piped else "".join(terminal.text.splitlines()[:-1])
        assert joined(text) == joined(STORY)


def test_redrawing_never_clears_first() -> None:
    with Terminal("generate", "hi") as terminal:
        terminal.finish()
        assert b"\x1b[2J" not in terminal.raw and b"\x1b[H" not in terminal.raw
        assert b"\x1b[?1049h" not in terminal.raw
        draws = re.findall(rb"\x1b\[\?2026h(.*?)\x1b\[\?2026l", terminal.raw, re.S)
        assert len(draws) >= 27
        for draw in draws:
            before_text = re.match(rb"(?:\x1b\[\?25l|\r|\x1b\[\d+A)*", draw)[0]
            assert b"J" not in before_text and b"K" not in before_text


def test_looks_differ_without_colour() -> None:
    with Terminal("generate", "hi", NO_COLOR="1") as terminal:
        assert terminal.finish() == 0
        styles = set(re.findall(rb"\x1b\[([\d;]*)m", terminal.raw))
        assert {b"1", b"4", b"2"} <= styles  # bold, underlined, faint
        assert not any(re.search(rb"(^|;)(3|4|9|10)\d(;|$)", style) for style in styles)
        assert "░" in "".join(terminal.frames)


def test_looks_differ_with_colour() -> None:
    with Terminal("generate", "hi") as terminal:
        terminal.finish()
        assert {b"1", b"4;33", b"2;34"} <= set(re.findall(rb"\x1b\[([\d;]*)m", terminal.raw))


def test_twenty_columns() -> None:
    with Terminal("generate", "hi", columns=20, rows=60, FAKE_DELAY="0.03") as terminal:
        terminal.wait("1:4/48")
        assert terminal.finish() == 0
        assert joined(terminal.text).startswith(joined(STORY))
        assert not re.search(r"\d:\d+/48", terminal.text)  # nothing of the status line stays


@pytest.mark.parametrize(("columns", "rows"), [(1, 5), (3, 3), (8, 2), (200, 1)])
def test_absurdly_small_windows(columns: int, rows: int) -> None:
    with Terminal("generate", "hi", columns=columns, rows=rows) as terminal:
        assert terminal.finish() == 0
        assert b"error" not in terminal.raw and b"Traceback" not in terminal.raw


def test_a_canvas_taller_than_the_window() -> None:
    with Terminal("generate", "hi", columns=40, rows=8, FAKE_CANVAS="256", FAKE_DELAY=SLOW) as terminal:
        terminal.wait("more below")
        terminal.wait("more above")
        assert terminal.finish() == 0
        assert joined(terminal.scrolled).startswith(joined(STORY))
        assert terminal.scrolled.count("Once upon") == 1
        assert "more" not in terminal.scrolled.replace("morning", "")


@pytest.mark.parametrize("columns", [30, 50, 110])
def test_resizing_while_it_runs(columns: int) -> None:
    with Terminal("generate", "hi", FAKE_DELAY=SLOW) as terminal:
        terminal.wait("canvas 1 · step 4/48")
        terminal.resize(columns, 30)
        terminal.wait(lambda t: re.search(r"(canvas 2 · step|2:)", t.text))
        width = max(map(len, terminal.text.splitlines()))
        assert width <= columns
        assert terminal.finish() == 0
        assert joined(STORY[-100:]) in joined(terminal.text)
        assert "48" not in terminal.text  # no status line is left behind


def test_a_resize_redraws_before_the_next_step() -> None:
    with Terminal("generate", "hi", FAKE_DELAY="2") as terminal:
        terminal.wait("step 1/48")
        terminal.resize(30, 24)
        terminal.wait("1:1/48", patience=1.5)


def test_the_clock_runs_while_a_step_takes_long() -> None:
    with Terminal("generate", "hi", FAKE_DELAY="3") as terminal:
        terminal.wait("reading the prompt")
        terminal.wait(lambda t: re.search(r"reading the prompt · [12]\.\d s", t.text), patience=2.9)


def test_ctrl_c_is_130_and_leaves_the_committed_text() -> None:
    with Terminal("generate", "hi", FAKE_DELAY=SLOW) as terminal:
        terminal.wait("canvas 2 · step 3/48")
        terminal.interrupt()
        assert terminal.finish() == 130
        assert joined(terminal.text) == joined(STORY[: STORY.index(" The fox")])
        assert not terminal.screen.cursor.hidden


def test_sigterm_brings_the_cursor_back() -> None:
    with Terminal("generate", "hi", FAKE_DELAY=SLOW) as terminal:
        terminal.wait("canvas 1 · step 3/48")
        assert terminal.screen.cursor.hidden
        terminal.process.terminate()
        assert terminal.finish() == 143
        assert not terminal.screen.cursor.hidden
        assert terminal.text == ""


def test_a_failing_run_leaves_one_line() -> None:
    with Terminal("generate", "BOOM") as terminal:
        assert terminal.finish() == 1
        assert re.fullmatch(
            r"error: unexpected RuntimeError: the network fell over .*", terminal.text.replace("\n", "")
        )
        assert not terminal.screen.cursor.hidden


def test_a_warning_stands_above_the_canvas() -> None:
    with Terminal("generate", "WARN") as terminal:
        assert terminal.finish() == 0
        assert terminal.text.startswith("warning: the slow path is used\nOnce upon a time")


@pytest.mark.parametrize("flags", [[], ["--no-watch"]])
def test_a_model_cannot_steer_the_terminal(flags: list[str]) -> None:
    evil = "a\x1b]0;owned\x07b\x1b[2J\x9b5mc\x1b[31md\re"
    with Terminal("generate", "hi", *flags, FAKE_TEXT=evil, FAKE_CANVAS="64") as terminal:
        assert terminal.finish() == 0
        for sequence in (b"\x1b]0", b"\x07", b"\x1b[2J", b"\xc2\x9b", b"\x1b[31m"):
            assert sequence not in terminal.raw
        assert terminal.text.startswith("a␛]0;owned␇b␛[2J\ufffd5mc␛[31md␍e")


def test_no_watch_writes_plain_text() -> None:
    with Terminal("generate", "hi", "--no-watch") as terminal:
        assert terminal.finish() == 0
        assert b"\x1b" not in terminal.raw
        assert joined(terminal.text) == joined(STORY)


def test_a_dumb_terminal_gets_no_sequences() -> None:
    with Terminal("generate", "hi", TERM="dumb") as terminal:
        assert terminal.finish() == 0
        assert b"\x1b[?" not in terminal.raw


def test_an_ascii_terminal_gets_ascii_signs() -> None:
    with Terminal("generate", "hi", PYTHONIOENCODING="ascii", FAKE_TEXT="plain words only, and a few more") as terminal:
        assert terminal.finish() == 0
        assert terminal.raw.isascii()
        assert "::" in "".join(terminal.frames)


def test_stdout_piped_is_plain_and_nothing_is_drawn() -> None:
    with Terminal("generate", "hi", piped="stdout") as terminal:
        assert terminal.finish() == 0
        assert terminal.read_piped() == STORY + "\n"
        assert not any("canvas" in frame for frame in terminal.frames)
        assert terminal.text == ""


def test_stdout_piped_and_watched_draws_on_stderr() -> None:
    with Terminal("generate", "hi", "--watch", piped="stdout") as terminal:
        terminal.wait("canvas 1 · step")
        assert terminal.finish() == 0
        assert terminal.read_piped() == STORY + "\n"
        assert terminal.text == ""


def test_stderr_piped_leaves_a_plain_answer() -> None:
    with Terminal("generate", "hi", "--stats", piped="stderr") as terminal:
        assert terminal.finish() == 0
        assert b"\x1b" not in terminal.raw
        assert joined(terminal.text) == joined(STORY)
        assert "133 tokens, ended by stop" in terminal.read_piped()
        assert "\x1b" not in terminal.read_piped()


def test_no_prompt_at_a_terminal() -> None:
    with Terminal("generate") as terminal:
        assert terminal.finish() == 2
        assert terminal.text.startswith("error: PROMPT: missing")


class TestChat:
    """A conversation with someone at the keyboard."""

    def test_turns(self) -> None:
        with Terminal("chat", FAKE_TEXT="ECHO") as terminal:
            terminal.wait(prompted).send("hello\n")
            terminal.wait("\nYou said: hello\n>").send("/reset\n")
            terminal.wait("(a new conversation)").send("\x04")
            assert terminal.finish() == 0

    def test_ctrl_c_stops_an_answer_and_keeps_the_session(self) -> None:
        with Terminal("chat", "--seed", "1", FAKE_DELAY=SLOW) as terminal:
            terminal.wait(prompted).send("tell\n")
            terminal.wait("canvas 2 · step 3/48").interrupt()
            terminal.wait("stays in the conversation")
            assert "One day the heron was gone." in terminal.text
            terminal.wait(prompted).send("/stats\n")
            terminal.wait("(no answer yet)").send("/quit\n")
            assert terminal.finish() == 0

    def test_ctrl_c_at_the_prompt_hints_and_then_leaves(self) -> None:
        with Terminal("chat", FAKE_TEXT="ECHO") as terminal:
            terminal.wait(prompted).interrupt()
            terminal.wait("once more leaves")
            terminal.wait(prompted).send("still here\n")
            terminal.wait("You said: still here\n>").interrupt()
            terminal.wait(lambda t: t.text.count("once more leaves") == 2 and prompted(t)).interrupt()
            assert terminal.finish() == 130

    def test_prompt_goes_to_stderr_when_stdout_is_a_file(self) -> None:
        with Terminal("chat", piped="stdout", FAKE_TEXT="ECHO") as terminal:
            terminal.wait(prompted).send("hello\n")
            terminal.wait(lambda t: prompted(t) and "> hello" in t.text).send("\x04")
            assert terminal.finish() == 0
            assert terminal.read_piped() == "You said: hello\n"

    def test_history_with_the_arrow_keys(self) -> None:
        pytest.importorskip("readline")
        with Terminal("chat", FAKE_TEXT="ECHO") as terminal:
            terminal.wait(prompted).send("hello\n")
            terminal.wait("You said: hello\n>").send("\x1b[A\n")
            terminal.wait(lambda t: t.text.count("You said: hello") == 2).send("/quit\n")
            assert terminal.finish() == 0
