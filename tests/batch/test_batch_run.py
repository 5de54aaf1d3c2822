"""A run from end to end on a model that answers at once: every line once, resumed, refused, stopped."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from lines import assert_all_answered, dump, expected, read, request, seed_of, text_of, write

from dgemma.batch import BatchSettings, Progress, Summary, run
from dgemma.errors import ConfigError, Draining
from dgemma.params import SamplingParams


def start(folder: Path, model: Any = None, report: Any = lambda progress: None, /, **settings: Any) -> Summary:
    own = {"source": folder / "in.jsonl", "target": folder / "out.jsonl", **settings}
    stop = own.pop("stop", None)
    return run(BatchSettings(**own), FakeModel() if model is None else model, report, stop=stop)


def no_model() -> Any:
    raise AssertionError("the model is not needed")


def test_every_line_is_answered_once_as_openai_writes_it(tmp_path: Path) -> None:
    asked = [request(n, max_tokens=9) for n in range(100)]
    write(tmp_path / "in.jsonl", asked)
    summary = start(tmp_path)
    assert_all_answered(tmp_path / "out.jsonl", asked)
    assert (summary.done, summary.failed, summary.total, summary.stopped) == (100, 0, 100, False)
    assert (summary.tokens, summary.forwards, summary.tokens_per_forward) == (500, 200, 2.5)
    lines = read(tmp_path / "out.jsonl")
    for line in lines:
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert line["id"].startswith("batch_req_") and line["response"]["request_id"] == line["id"][6:]
        body = line["response"]["body"]
        assert body["object"] == "chat.completion" and body["usage"]["completion_tokens"] == 5
    assert len({line["id"] for line in lines}) == 100
    assert [line["custom_id"] for line in lines] != [line["custom_id"] for line in asked]  # as they are done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.state.json"]


def test_openais_own_client_reads_the_answers(tmp_path: Path) -> None:
    from openai.types.chat import ChatCompletion
    from openai.types.completion import Completion

    completion = {"custom_id": "c", "method": "POST", "url": "/v1/completions"}
    asked = [request(1, n=3), {**completion, "body": {"model": "demo", "prompt": ["one", "two"], "n": 2}}]
    write(tmp_path / "in.jsonl", asked)
    start(tmp_path)
    bodies = {line["custom_id"]: line["response"]["body"] for line in read(tmp_path / "out.jsonl")}
    chat = ChatCompletion.model_validate(bodies["r1"], strict=True)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chat.choices}) == 3  # seeds count upwards
    assert len(Completion.model_validate(bodies["c"], strict=True).choices) == 4


BAD: dict[str, tuple[bytes, str | None, str]] = {
    "no JSON": (b"{", None, "invalid_json"),
    "no UTF-8": (b'{"custom_id": "\xff"}', None, "invalid_json"),
    "half a surrogate pair": (rb'{"custom_id": "\ud800"}', None, "invalid_json"),
    "NaN": (b'{"custom_id": NaN}', None, "invalid_json"),
    "a key twice": (b'{"custom_id": "a", "custom_id": "b"}', None, "invalid_json"),
    "too deep": (b"[" * 100_000, None, "invalid_json"),
    "a list": (b"[]", None, "invalid_type"),
    "no custom_id": (dump({**request(1), "custom_id": None}), None, "missing_required_parameter"),
    "custom_id a number": (dump({**request(1), "custom_id": 7}), None, "invalid_type"),
    "custom_id empty": (dump({**request(1), "custom_id": ""}), None, "invalid_type"),
    "no body": (b'{"custom_id": "x", "method": "POST", "url": "/v1/completions"}', "x", "missing_required_parameter"),
    "body a text": (dump({**request(1), "body": "hi"}), "r1", "invalid_type"),
    "method GET": (dump({**request(1), "method": "GET"}), "r1", "invalid_value"),
    "another url": (dump({**request(1), "url": "/v1/embeddings"}), "r1", "invalid_url"),
    "a field too many": (dump({**request(1), "priority": 1}), "r1", "unknown_parameter"),
}
REFUSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "streamed": (request(1, stream=True), "stream"),
    "another model": (request(1, model="gpt-4o-mini"), "model"),
    "out of range": (request(1, temperature=-1), "temperature"),
    "not honoured": (request(1, frequency_penalty=1), "frequency_penalty"),
    "no messages": (request(1, messages=[]), "messages"),
    "too long": (request(1, "TOOLONG"), "messages"),
    "fails under way": (request(1, "NAN"), None),
}


@pytest.mark.parametrize("name", [*BAD, *REFUSED])
def test_what_cannot_be_answered_is_written_down_and_stops_nothing(tmp_path: Path, name: str) -> None:
    good = [request(n) for n in range(5, 9)]
    line = BAD[name][0] if name in BAD else dump(REFUSED[name][0])
    write(tmp_path / "in.jsonl", [*good[:2], "", line, *good[2:]])
    summary = start(tmp_path)
    assert (summary.done, summary.failed, summary.total) == (4, 1, 5)
    assert summary.errors == tmp_path / "out.errors.jsonl"
    assert_all_answered(tmp_path / "out.jsonl", good)
    (failure,) = read(tmp_path / "out.errors.jsonl")
    assert failure["line"] == 4 and failure["id"].startswith("batch_req_")
    if name in BAD:
        _, custom_id, code = BAD[name]
        assert (failure["custom_id"], failure["response"], failure["error"]["code"]) == (custom_id, None, code)
        assert failure["error"]["message"] and "\n" not in failure["error"]["message"]
    else:
        assert (failure["custom_id"], failure["error"]) == ("r1", None)
        assert 400 <= failure["response"]["status_code"] < 500
        assert failure["response"]["body"]["error"]["param"] == REFUSED[name][1]


def test_a_second_custom_id_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1), request(2), request(3, "other", custom_id="r1"), request(4)])
    start(tmp_path)
    (failure,) = read(tmp_path / "out.errors.jsonl")
    assert (failure["line"], failure["custom_id"], failure["error"]["code"]) == (3, "r1", "duplicate_custom_id")
    assert_all_answered(tmp_path / "out.jsonl", [request(1), request(2), request(4)])


def test_no_model_is_loaded_for_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["{", "[]"])
    assert start(tmp_path, no_model).failed == 2
    assert start(tmp_path, no_model).failed == 2  # again: it is done
    (tmp_path / "empty.jsonl").touch()
    summary = start(tmp_path, no_model, source=tmp_path / "empty.jsonl", target=tmp_path / "none.jsonl")
    assert (summary.total, summary.done) == (0, 0) and (tmp_path / "none.jsonl").read_bytes() == b""


def test_bad_lines_are_written_before_the_model_loads(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1), "{", request(2)])
    stages: list[str] = []

    def load() -> FakeModel:
        assert [line["line"] for line in read(tmp_path / "out.errors.jsonl")] == [2]
        assert stages == ["checking", "loading"]
        return FakeModel()

    start(tmp_path, load, lambda progress: stages.append(progress.stage))
    assert list(dict.fromkeys(stages)) == ["checking", "loading", "running", "writing", "done"]


def test_lines_settings_win_over_the_runs(tmp_path: Path) -> None:
    asked = [request(1), request(2, max_tokens=1), request(3, diffusion={"max_new_tokens": 7}), request(4, seed=5)]
    write(tmp_path / "in.jsonl", asked)
    start(tmp_path, params=SamplingParams(max_new_tokens=3, seed=11))
    texts = {line["custom_id"]: text_of(line) for line in read(tmp_path / "out.jsonl")}
    own = [3, 1, 7, 3]
    for line, budget in zip(asked, own, strict=True):
        body = {**line["body"], "max_tokens": budget}
        assert texts[line["custom_id"]] == expected({**line, "body": body}, 11)


def test_any_model(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1, model="gpt-4o-mini")])
    assert start(tmp_path, any_model=True).done == 1
    (line,) = read(tmp_path / "out.jsonl")
    assert line["response"]["body"]["model"] == "demo"


def test_one_url_alone(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    assert start(tmp_path, url="/v1/completions").failed == 1


@pytest.mark.parametrize("way", ["stop", "report", "model"])
def test_an_early_end_leaves_files_that_the_next_start_goes_on_with(tmp_path: Path, way: str) -> None:
    asked = [request(n) for n in range(300)]
    write(tmp_path / "in.jsonl", [*asked, "{"])
    stop, model = threading.Event(), FakeModel(delay=0.03)

    def report(progress: Progress) -> None:
        if progress.done >= 30:
            if way == "report":
                raise KeyboardInterrupt
            stop.set()

    if way == "model":
        model.closes_after = 100
        with pytest.raises(Draining):
            start(tmp_path, model)
    elif way == "report":
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, model, report)
    else:
        assert start(tmp_path, model, report, stop=stop).stopped
    before = (tmp_path / "out.jsonl").read_bytes()
    answered = {line["custom_id"] for line in read(tmp_path / "out.jsonl")}
    assert 0 < len(answered) < 300
    again = FakeModel()
    summary = start(tmp_path, again)
    assert (summary.resumed, summary.done, summary.failed) == (len(answered) + 1, 300, 1)
    assert len(again.asked) == 300 - len(answered)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    assert_all_answered(tmp_path / "out.jsonl", asked)


def test_unforeseen_errors_are_the_lines_own_or_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(n, "CRASH" if n % 10 == 3 else None) for n in range(60)]
    write(tmp_path / "in.jsonl", asked)
    assert start(tmp_path).failed == 6
    failures = read(tmp_path / "out.errors.jsonl")
    assert {line["response"]["body"]["error"]["code"] for line in failures} == {"internal_error"}
    monkeypatch.setenv("FAKE_BROKEN", "1")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start(tmp_path, restart=True)
    assert not (tmp_path / "out.errors.jsonl").exists()  # none of them is to blame
    monkeypatch.delenv("FAKE_BROKEN")
    assert start(tmp_path).failed == 6


def test_a_line_that_trips_the_reader_or_the_tokenizer_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgemma.batch.form import Form

    read_one, submit = Form._read, FakeModel.submit

    def trip(form: Form, record: Any) -> Any:
        if record.line == 2:
            raise RecursionError("too deep")
        return read_one(form, record)

    def choke(model: FakeModel, prompt: Any, *rest: Any, **named: Any) -> Any:
        if prompt[-1]["content"] == "say 4":
            raise TypeError("in the template")
        return submit(model, prompt, *rest, **named)

    monkeypatch.setattr(Form, "_read", trip)
    monkeypatch.setattr(FakeModel, "submit", choke)
    write(tmp_path / "in.jsonl", [request(n) for n in range(1, 9)])
    assert (start(tmp_path).done, start(tmp_path).failed) == (6, 2)
    assert sorted(line["line"] for line in read(tmp_path / "out.errors.jsonl")) == [2, 4]


def test_settings_that_no_line_could_have_end_it_at_once(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(5)])
    with pytest.raises(ConfigError, match=r"^canvas_length: 512 is above"):
        start(tmp_path, params=SamplingParams(canvas_length=512))
    assert not read(tmp_path / "out.errors.jsonl")
    with pytest.raises(ConfigError, match=r"^stop: "):
        start(tmp_path, no_model, params=SamplingParams(stop=tuple("abcdef")))


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"params": SamplingParams(seed=3)},
    "max_new_tokens": {"params": SamplingParams(max_new_tokens=3)},
    "model": {"model": "other"},
    "shard": {"shard": (1, 2)},
    "url": {"url": "/v1/completions"},
    "any_model": {"any_model": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_do_not_go_on_with_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(5)])
    start(tmp_path)
    with pytest.raises(ConfigError, match=f"^{name}: .*out.jsonl was begun with .*--restart"):
        start(tmp_path, no_model, **CHANGES[name])
    start(tmp_path, restart=True, **CHANGES[name])


def test_another_input_does_not_go_on_with_it_but_the_same_elsewhere_does(tmp_path: Path) -> None:
    asked = [request(n) for n in range(5)]
    write(tmp_path / "in.jsonl", asked)
    start(tmp_path)
    write(tmp_path / "copy.jsonl", asked)
    start(tmp_path, no_model, source=tmp_path / "copy.jsonl")
    write(tmp_path / "in.jsonl", [*asked, request(6)])
    with pytest.raises(ConfigError, match="another content of the input"):
        start(tmp_path, no_model)
    assert start(tmp_path, restart=True).done == 6


def test_other_weights_do_not_go_on_with_it(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(50)])
    model, stop = FakeModel(delay=0.3), threading.Event()
    model.directory = tmp_path / "model"
    model.directory.mkdir()
    (model.directory / "model.safetensors").write_bytes(bytes(5_000_000))
    (model.directory / "config.json").write_text("{}")
    assert start(
        tmp_path, model, lambda progress: stop.set() if progress.stage == "running" else None, stop=stop
    ).stopped
    write(tmp_path / "model" / "model.safetensors", [bytes(4_999_998) + b"1\n"])
    with pytest.raises(ConfigError, match="other weights"):
        start(tmp_path, model)


def test_files_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    write(tmp_path / "out.jsonl", ["something dear"])
    with pytest.raises(ConfigError, match=r"out\.jsonl: is there already"):
        start(tmp_path, no_model)
    assert (tmp_path / "out.jsonl").read_text() == "something dear\n"
    start(tmp_path, restart=True)
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(dump({"id": "batch_req_of another", "custom_id": "x"}) + b"\n")
    state = json.loads((tmp_path / "out.state.json").read_text())
    (tmp_path / "out.state.json").write_text(json.dumps({**state, "finished": False}))
    with pytest.raises(ConfigError, match="not from this run"):
        start(tmp_path, no_model)


def test_what_is_taken_ahead_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n, n=3) for n in range(200)])
    model = FakeModel(max_batch=4, max_queue=100)
    start(tmp_path, model)
    assert 16 <= model.most <= 18  # four times what runs at once; three answers a request
    few = FakeModel(max_batch=4, max_queue=2)
    start(tmp_path, few, restart=True)
    assert few.most <= 6


def test_an_engine_that_others_use_too_is_waited_for(tmp_path: Path) -> None:
    asked = [request(n) for n in range(40)]
    write(tmp_path / "in.jsonl", asked)
    model = FakeModel(delay=0.002, max_batch=2, max_queue=4)
    model.start()
    others = threading.Thread(target=lambda: [_patiently(model) for _ in range(50)])
    others.start()
    start(tmp_path, model)
    others.join()
    assert_all_answered(tmp_path / "out.jsonl", asked)


def _patiently(model: FakeModel) -> None:
    from dgemma.errors import QueueFull

    while True:
        try:
            return list(model.submit("theirs"))[-1]  # type: ignore[return-value]
        except QueueFull:
            threading.Event().wait(0.001)


def test_time_left_and_pace() -> None:
    from dataclasses import asdict

    progress = Progress(
        stage="running", lines=100, total=100, done=40, failed=10, resumed=30, fresh=20, tokens=600, prompt_tokens=9,
        forwards=60, seconds=11.0, running_seconds=10.0,
    )  # fmt: skip
    assert (progress.tokens_per_second, progress.tokens_per_forward, progress.seconds_left) == (60, 10, 25)
    assert Progress(**{**asdict(progress), "total": None}).seconds_left is None


def test_seeds_follow_from_the_custom_id_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [request(n) for n in range(20)])
    write(tmp_path / "b.jsonl", [request(n) for n in reversed(range(20))])
    for name in "ab":
        start(tmp_path, source=tmp_path / f"{name}.jsonl", target=tmp_path / f"out-{name}.jsonl")
    texts = [{line["custom_id"]: text_of(line) for line in read(tmp_path / f"out-{name}.jsonl")} for name in "ab"]
    assert texts[0] == texts[1]
    assert len({seed_of(f"id r{n}") for n in range(1000)}) == 1000


def test_a_line_full_of_others_requests_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    """It waits for room, and looks up meanwhile; with room it goes on."""
    asked = [request(n) for n in range(40)]
    write(tmp_path / "in.jsonl", asked)
    model = FakeModel(delay=3.0, max_batch=2, max_queue=4)
    others = [model.submit("of someone else") for _ in range(6)]
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    assert run(settings, model, stop=stop).stopped
    assert time.monotonic() - started < 2.5
    for ticket in others:
        ticket.cancel()
    model.delay = 0.0
    assert start(tmp_path, model).done == 40
    assert_all_answered(tmp_path / "out.jsonl", asked)
