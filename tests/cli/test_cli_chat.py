"""`dgemma chat` with a script on stdin: turns, commands, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_model import FakeModel, Invoke

from dgemma.events import Commit


@pytest.fixture
def echo(model: FakeModel) -> FakeModel:
    """A model that repeats what it was told."""
    model.text = None
    return model


def roles(prompt: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in prompt]


def test_turns_and_history(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", "--seed", "4", input="one\n\ntwo\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "You said: one\nYou said: two\n", "")
    assert roles(echo.calls[1]["prompt"]) == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]
    assert echo.calls[1]["params"].seed == 4


def test_last_line_without_newline(invoke: Invoke, echo: FakeModel) -> None:
    assert invoke("chat", input="one").stdout == "You said: one\n"


def test_quit_leaves(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input="one\n/quit\ntwo\n")
    assert (result.exit_code, result.stdout) == (0, "You said: one\n")


def test_continued_lines(invoke: Invoke, echo: FakeModel) -> None:
    invoke("chat", input="first\\\nsecond\\\n\nnext\n")
    assert [call["prompt"][-1]["content"] for call in echo.calls] == ["first\nsecond\n", "next"]


def test_reset_keeps_the_system_message(invoke: Invoke, echo: FakeModel) -> None:
    invoke("chat", "--system", "Be brief", input="one\n/reset\ntwo\n")
    assert roles(echo.calls[1]["prompt"]) == [("system", "Be brief"), ("user", "two")]


def test_system_is_set_and_removed(invoke: Invoke, echo: FakeModel) -> None:
    invoke("chat", input="/system Speak like a pirate\none\n/system\n/reset\ntwo\n")
    assert roles(echo.calls[0]["prompt"])[0] == ("system", "Speak like a pirate")
    assert roles(echo.calls[1]["prompt"]) == [("user", "two")]


def test_seed(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", "--temperature", "0.5", input="/seed 9\none\n/seed\ntwo\n/seed x\n/seed 1e99\nthree\n")
    assert [call["params"].seed for call in echo.calls] == [9, None, None]
    assert {call["params"].temperature for call in echo.calls} == {0.5}
    assert result.stderr.count("error: /seed: ") == 2


def test_stats(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input="/stats\none\n/stats\n")
    assert "(no answer yet)" in result.stderr
    assert "per forward" in result.stderr
    assert result.stdout == "You said: one\n"


def test_save(invoke: Invoke, echo: FakeModel, tmp_path: Path) -> None:
    path = tmp_path / "talk with 海.json"
    path.write_text("old")
    result = invoke("chat", "--system", "S", input=f"naïve 海\n/save {path}\n")
    assert result.exit_code == 0
    assert roles(json.loads(path.read_text(encoding="utf-8"))) == [
        ("system", "S"),
        ("user", "naïve 海"),
        ("assistant", "You said: naïve 海"),
    ]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["", " .", " no/such/folder/x.json"])
def test_save_that_cannot_be(where: str, invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input=f"/save{where}\none\n")
    assert result.stderr.startswith("error: /save: ") and result.stderr.count("\n") == 1
    assert result.stdout == "You said: one\n"
    assert result.exit_code == 1


def test_unknown_command_goes_on(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input="/explode now\n/\none\n")
    assert result.stderr.splitlines() == [
        "/explode: no such command; /help lists them",
        "/: no such command; /help lists them",
    ]
    assert result.stdout == "You said: one\n"
    assert result.exit_code == 0


def test_help(invoke: Invoke, echo: FakeModel) -> None:
    said = invoke("chat", input="/help\n").stderr
    for name in ("/reset", "/system", "/seed", "/stats", "/save", "/quit", "Ctrl-C"):
        assert name in said


def test_a_message_that_begins_with_a_slash(invoke: Invoke, echo: FakeModel) -> None:
    invoke("chat", input="//etc/hosts is what?\n")
    assert echo.calls[0]["prompt"][-1]["content"] == "/etc/hosts is what?"


def test_a_failed_turn_is_dropped_and_reported(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input="REFUSE this\ntwo\n")
    assert result.stderr == "error: --seed: refused on request\n"
    assert roles(echo.calls[1]["prompt"]) == [("user", "two")]
    assert (result.stdout, result.exit_code) == ("You said: two\n", 1)


def test_a_crash_ends_it(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input="BOOM\ntwo\n")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_line_that_is_no_text(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", input=b"caf\xe9\nnul\x00\ntwo\n")
    assert result.stderr.count("error: ") == result.stderr.count("\n") == 2
    assert result.stdout == "You said: two\n"


def test_an_interrupted_answer_stays_as_far_as_it_was_shown(
    invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(model, monkeypatch, Commit)
    result = invoke("chat", input="one\ntwo\n")
    first = model.tokenizer.decode(model.tokenizer.encode(model.text or "")[:48])
    assert result.stdout.startswith(first + "\n")
    assert "stays in the conversation" in result.stderr
    assert roles(model.calls[1]["prompt"]) == [("user", "one"), ("assistant", first), ("user", "two")]
    assert model.closed == 2


def test_an_answer_interrupted_before_any_text_is_dropped(
    invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(model, monkeypatch, object)
    invoke("chat", input="one\ntwo\n")
    assert roles(model.calls[1]["prompt"]) == [("user", "two")]


def test_thoughts_stay_out_of_the_history(invoke: Invoke, echo: FakeModel) -> None:
    result = invoke("chat", "--think", input="one\ntwo\n")
    assert "thoughts: hm" in result.stderr
    assert roles(echo.calls[1]["prompt"])[1] == ("assistant", "You said: one")


def interrupt_after(model: FakeModel, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """Ctrl-C arrives after the first event of that kind."""
    inner = model.stream

    def stream(*args: object, **settings: object) -> object:
        events = inner(*args, **settings)  # type: ignore[arg-type]
        try:
            for event in events:
                yield event
                if isinstance(event, kind):
                    raise KeyboardInterrupt
        finally:
            events.close()

    monkeypatch.setattr(model, "stream", stream)
