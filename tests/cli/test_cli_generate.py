"""`dgemma generate` in this process: where things are written, what reaches the model, and what JSON holds."""

from __future__ import annotations

import json
import warnings

import pytest
from fake_model import STORY, FakeModel, Invoke

from dgemma.cli import answer
from dgemma.cli.views import PlainView
from dgemma.events import Stats
from dgemma.params import PRESETS, SamplingParams


def test_text_alone_on_stdout(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "Tell me a story")
    assert (result.exit_code, result.stdout, result.stderr) == (0, STORY + "\n", "")
    assert model.calls[0]["prompt"] == [{"role": "user", "content": "Tell me a story"}]
    assert model.closed == 1


def test_a_newline_of_the_answer_is_not_doubled(invoke: Invoke, model: FakeModel) -> None:
    model.text = "a\nb\n"
    assert invoke("generate", "hi").stdout == "a\nb\n"


def test_a_pipe_gets_the_text_as_it_is(invoke: Invoke, model: FakeModel) -> None:
    model.text = "bell \a and \x1b[31mred\x1b[0m"
    assert invoke("generate", "hi").stdout == model.text + "\n"


@pytest.mark.parametrize("arguments", [("generate",), ("generate", "-")])
@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        ("hello\n", "hello"),
        ("two\nlines\n\n", "two\nlines\n"),
        ("dos\r\nlines\r\n", "dos\nlines"),
        ("\ufeffmark", "mark"),
        ("海 🦊", "海 🦊"),
    ],
)
def test_prompt_from_stdin(
    arguments: tuple[str, ...], data: str, prompt: str, invoke: Invoke, model: FakeModel
) -> None:
    assert invoke(*arguments, input=data).exit_code == 0
    assert model.calls[0]["prompt"][-1]["content"] == prompt


def test_stdin_is_left_alone_when_there_is_a_prompt(invoke: Invoke, model: FakeModel) -> None:
    invoke("generate", "from the argument", input="from stdin")
    assert model.calls[0]["prompt"][-1]["content"] == "from the argument"


def test_every_flag_reaches_the_model(invoke: Invoke, model: FakeModel) -> None:
    flags = "--max-new-tokens 20 --min-tokens 2 --seed 7 --temperature 0 --max-steps 5 --entropy-bound 0.2"
    more = "--canvas-length 16 --stop END --stop STOP --think --system Briefly --device cpu --dtype float32 --threads 2"
    result = invoke("generate", "hi", *flags.split(), *more.split())
    assert result.exit_code == 0, result.stderr
    call = model.calls[0]
    params = call["params"]
    assert (params.max_new_tokens, params.min_tokens, params.seed, params.temperature) == (20, 2, 7, 0)
    assert (params.max_denoising_steps, params.entropy_bound, params.canvas_length) == (5, 0.2, 16)
    assert params.stop == ("END", "STOP")
    assert call["think"] and not call["raw"]
    assert [message["role"] for message in call["prompt"]] == ["system", "user"]
    assert model.loaded == {"name": "demo", "device": "cpu", "dtype": "float32", "threads": 2}


def test_unset_flags_stay_unset(invoke: Invoke, model: FakeModel) -> None:
    invoke("generate", "hi")
    assert model.calls[0]["params"] == SamplingParams()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_flags_that_win_over_them(preset: str, invoke: Invoke, model: FakeModel) -> None:
    invoke("generate", "hi", "--preset", preset)
    invoke("generate", "hi", "--preset", preset, "--entropy-bound", "0.07")
    plain, explicit = (call["params"] for call in model.calls)
    for name, value in PRESETS[preset].items():
        assert getattr(plain, name) == value
    assert explicit.entropy_bound == 0.07
    assert explicit.confidence_threshold == plain.confidence_threshold


def test_raw_gives_the_text_itself(invoke: Invoke, model: FakeModel) -> None:
    invoke("generate", "Once upon", "--raw")
    assert model.calls[0]["prompt"] == "Once upon"
    assert model.calls[0]["raw"]


def test_json(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "hi", "--json", "--seed", "5")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert set(data) == {"text", "tokens", "finish_reason", "seed", "thoughts", "stats"}
    assert (data["text"], data["finish_reason"], data["seed"], data["thoughts"]) == (STORY, "stop", 5, None)
    assert data["tokens"] == model.tokenizer.encode(STORY)
    assert set(data["stats"]) == set(Stats.__dataclass_fields__)
    assert data["stats"]["steps_per_canvas"] == [9, 9, 9]
    assert data["stats"]["tokens_per_second"] is None  # infinite, which JSON cannot say


def test_json_with_figures_keeps_stdout_json(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "hi", "--json", "--stats", "--think", "--watch")
    assert json.loads(result.stdout)["thoughts"] == "hm, a fox\x1b[31m"
    assert "tokens" in result.stderr


def test_length(invoke: Invoke, model: FakeModel) -> None:
    data = json.loads(invoke("generate", "hi", "--json", "--max-new-tokens", "4").stdout)
    assert (data["text"], data["finish_reason"]) == ("Once upon a time", "length")


def test_stats_on_stderr(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "hi", "--stats", "--seed", "3")
    assert result.stdout == STORY + "\n"
    assert "9 + 9 + 9 in 3 canvases" in result.stderr
    assert "4.93 tokens" in result.stderr
    assert result.stderr.splitlines()[-1].split() == ["seed", "3"]


def test_thoughts_go_to_stderr(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "hi", "--think")
    assert result.stdout == STORY + "\n"
    assert result.stderr == "thoughts: hm, a fox␛[31m\n"


def test_an_empty_answer_is_said(invoke: Invoke, model: FakeModel) -> None:
    model.text = ""
    result = invoke("generate", "hi")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("warning: ") and "--min-tokens" in result.stderr


def test_library_warnings_are_one_line(invoke: Invoke, model: FakeModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = invoke("generate", "WARN")
    assert result.stderr == "warning: the slow path is used\n"
    assert result.stdout == STORY + "\n"


def test_watching_without_a_terminal_gives_a_line_a_step(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "hi", "--watch")
    assert result.stdout == STORY + "\n"
    lines = result.stderr.splitlines()
    assert len(lines) == 27
    assert lines[0].startswith("canvas 1 · step 1/48 · ") and "░" in lines[0]
    assert lines[8].startswith("canvas 1 · step 9/48 · 0.00 nats") and "Once upon a time" in lines[8]
    assert "\x1b" not in result.stderr


def test_held_back_text_arrives_with_the_result(
    invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from dgemma.events import Commit

    inner = model.stream

    def stream(*args: object, **settings: object) -> object:
        for event in inner(*args, **settings):  # type: ignore[arg-type]
            yield replace(event, text=event.text[:-3]) if isinstance(event, Commit) and event.canvas == 2 else event

    monkeypatch.setattr(model, "stream", stream)
    assert invoke("generate", "hi").stdout == STORY + "\n"


def test_no_tokenizer(invoke: Invoke, model: FakeModel) -> None:
    model.tokenizer = None  # type: ignore[assignment]
    result = invoke("generate", "hi")
    assert result.exit_code == 2
    assert "tokenizer.json" in result.stderr


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("dgemma ")


def test_help_lists_only_commands_that_exist(invoke: Invoke) -> None:
    from dgemma.cli.app import COMMANDS

    for arguments in ([], ["--help"], ["-h"]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        for name in COMMANDS:
            assert f"  {name} " in result.stdout
            assert invoke(name, "--help").exit_code == 0


def test_an_interrupted_run_is_stopped_at_once(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []  # or the garbage collector would stop it
    inner = model.stream

    def stream(*args: object, **settings: object) -> object:
        kept.append(inner(*args, **settings))  # type: ignore[arg-type]
        return kept[-1]

    def interrupt(_commit: object) -> None:
        raise KeyboardInterrupt

    view = PlainView(quiet=True)
    monkeypatch.setattr(model, "stream", stream)
    monkeypatch.setattr(view, "commit", interrupt)
    done = answer.run(model, "hi", SamplingParams(), view)
    assert done.result is None
    assert model.closed == 1
