"""What an operator sees: health, figures for Prometheus, one log line a request; and never a word of a prompt."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake import FakeModel
from prometheus_client.parser import text_string_to_metric_families
from servers import SECONDS, Running, until

from dgemma.server.logs import JsonLines
from dgemma.server.run import Server, listen
from dgemma.server.service import Service
from dgemma.server.settings import ServerSettings

SECRET = "my hovercraft"


def figures(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of `/metrics`."""
    text = server.http.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures(start: Callable[..., Running]) -> None:
    server = start(FakeModel(delay=0.01))
    client = server.client()
    answers = [
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hello"}]) for _ in range(3)
    ]
    list(client.completions.create(model="fake", prompt="a", stream=True))
    for wrong in ("/v1/nope", "/secret/path", "/v1/models/other"):
        server.http.get(wrong)
    got = figures(server)
    steps = sum(ticket.steps_done for ticket in server.model.tickets)
    assert got["dgemma_ready", ()] == 1
    assert got["dgemma_steps_total", ()] == got["dgemma_forwards_total", ()] == steps
    assert got["dgemma_tokens_total", ()] >= sum(answer.usage.completion_tokens for answer in answers)
    assert got["dgemma_prompt_tokens_total", ()] == 3 * len("hello") + 1
    assert got["dgemma_cache_pages", ()] == 64 and got["dgemma_requests_running", ()] == 0
    for name in ("requests_queued", "batch_rows", "cache_pages_used", "reused_tokens_total", "preemptions_total"):
        assert got[f"dgemma_{name}", ()] == 0
    assert got["dgemma_time_to_first_text_seconds_count", ()] == 4
    assert 4 * 0.02 <= got["dgemma_time_to_first_text_seconds_sum", ()] < 60
    assert got["dgemma_tokens_per_forward_count", ()] == 4
    assert got["dgemma_request_seconds_count", (("endpoint", "/v1/chat/completions"),)] == 3
    requests = {key[1]: value for key, value in got.items() if key[0] == "dgemma_http_requests_total"}
    assert requests[("endpoint", "/v1/chat/completions"), ("status", "200")] == 3
    assert requests[("endpoint", "/v1/models/{name:path}"), ("status", "404")] == 1
    assert requests[("endpoint", "other"), ("status", "404")] == 2
    assert "secret" not in server.http.get("/metrics").text


def test_two_servers_do_not_share_figures(server: Running, start: Callable[..., Running]) -> None:
    server.client().completions.create(model="fake", prompt="a")
    other = start()
    assert not [key for key in figures(other) if key[0] == "dgemma_http_requests_total" and "completions" in str(key)]


@pytest.mark.parametrize("stream", [False, True])
def test_one_line_a_request(server: Running, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    caplog.set_level(logging.INFO, "dgemma.server")
    answer: Any = server.client().chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": SECRET}],
        user=SECRET,
        stream=stream,
        stream_options={"include_usage": True} if stream else openai.omit,
    )
    usage = list(answer)[-1].usage if stream else answer.usage
    line = json.loads(JsonLines().format(until(lambda: caplog.records)[-1]))
    assert set(line) == {
        "time", "level", "message", "id", "method", "path", "status", "seconds", "prompt_tokens", "completion_tokens",
        "steps", "first_text_seconds", "finish_reason",
    }  # fmt: skip
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["prompt_tokens"] == usage.prompt_tokens and line["completion_tokens"] == usage.completion_tokens
    assert line["steps"] == usage.completion_tokens_details.denoising_steps
    assert 0 < line["first_text_seconds"] <= line["seconds"] and line["finish_reason"] == "stop"
    assert line["level"] == "info" and line["time"].endswith("+00:00")


def test_no_prompt_in_any_line(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where the server fails, and the failure's own words quote it."""
    caplog.set_level(logging.DEBUG)
    client = server.client()
    for content in (SECRET, f"CRASH {SECRET}", f"NAN {SECRET}", f"FULL {SECRET}", f"TOOLONG {SECRET}"):
        for stream in (False, True):
            try:
                answer: Any = client.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": content}], stream=stream
                )
                list(answer)
            except openai.APIError as error:
                assert SECRET not in str(error)
    server.http.post("/v1/chat/completions", content=SECRET.encode(), headers={"content-type": "application/json"})
    until(lambda: not server.server.service.open_requests)
    ours = [record for record in caplog.records if record.name.startswith(("dgemma", "uvicorn"))]
    lines = [JsonLines().format(record) for record in ours]
    assert len(lines) > 10 and not [line for line in lines if "hovercraft" in line]
    crash = next(json.loads(line) for line in lines if "trace" in line)
    assert crash["error"] == "RuntimeError" and crash["level"] == "error"
    assert any("fake.py" in frame for frame in crash["trace"])


def test_who_left_is_in_the_log(start: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dgemma.server")
    server = start(FakeModel(hold=6))
    body = {"model": "fake", "messages": [{"role": "user", "content": "LONG"}]}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=body, timeout=0.5)
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_bytes())
    records = until(lambda: len(caplog.records) == 2 and caplog.records)
    lines = [json.loads(JsonLines().format(record)) for record in records]
    assert sorted((line["status"], line["finish_reason"]) for line in lines) == [
        (200, "disconnected"),
        (499, "disconnected"),
    ]


def test_not_ready_until_the_model_is(tmp_path: Any) -> None:
    """The port is open while the model is loaded, and says so."""
    settings = ServerSettings(port=0, data_dir=tmp_path / "data")
    listener = listen(settings)
    go, ready = threading.Event(), threading.Event()

    def load() -> Any:
        go.wait(SECONDS)
        return FakeModel()

    server = Server(Service(settings), load, lambda _: ready.set())
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    http = httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SECONDS)
    for path in ("/health", "/v1/models", "/v1/models/fake", "/v1/responses/a"):
        answer = http.get(path)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
        assert int(answer.headers["retry-after"]) > 0
    assert http.post("/v1/chat/completions", json={}).status_code == 503
    assert "dgemma_ready 0.0" in http.get("/metrics").text and http.get("/openapi.json").status_code == 200
    go.set()
    assert ready.wait(SECONDS)
    assert http.get("/health").json() == {"status": "ok"} and http.get("/v1/models").status_code == 200
    assert server.service.model is not None and server.service.model.started  # type: ignore[attr-defined]
    server.should_exit = True
    thread.join(SECONDS)


def test_the_page(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from dgemma.server import app

    answer = server.http.get("/")
    assert answer.status_code in (200, 404)
    if answer.status_code == 200:
        assert answer.headers["content-type"].startswith("text/html") and "<html" in answer.text
    monkeypatch.setattr(app.resources, "files", lambda package: tmp_path)
    assert server.http.get("/").json()["error"]["code"] == "not_found"
