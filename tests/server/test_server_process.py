"""`dgemma serve` as a process: how it starts, how it ends, what it says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from servers import SECONDS, until

from dgemma.cli.app import app

FAKE = str(Path(__file__).with_name("fake.py"))
SOURCE = str(Path(__file__).parents[2] / "src")
posix = pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX system")


class Process:
    """A server of its own process; `lines` is what it has written to stderr."""

    def __init__(self, *arguments: str, **environment: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_", "FAKE_"))}
        self.port = 0
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, FAKE, "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, "PYTHONPATH": SOURCE, "XDG_DATA_HOME": os.devnull, **environment},
            text=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def ready(self) -> Process:
        """Waits for the line that says so."""
        line = until(lambda: next((line for line in self.lines if line.startswith("serving ")), None), 150)
        self.port = int(line.split(" (")[0].rpartition(":")[2])
        return self

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def end(self) -> int:
        """Waits for its end and returns its exit code; nothing was written to stdout."""
        code = self.process.wait(SECONDS)
        self.reader.join(SECONDS)
        assert self.process.stdout is not None and self.process.stdout.read() == ""
        return code


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    """Starts processes; those still there at the end are killed."""
    processes: list[Process] = []

    def begin(*arguments: str, **environment: str) -> Process:
        processes.append(Process(*arguments, **environment))
        return processes[-1]

    yield begin
    for one in processes:
        one.process.kill()
        one.process.communicate()


def streams(server: Process, content: str, count: int) -> tuple[list[threading.Thread], list[list[Any]]]:
    """Streams under way, each with its first text; their chunks and what they ended with."""
    threads, taken = [], []
    for seed in range(count):
        chunks: list[Any] = []

        def take(chunks: list[Any] = chunks, seed: int = seed) -> None:
            try:
                for chunk in server.client().chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": content}], stream=True, seed=seed
                ):
                    chunks.append(chunk)
            except openai.APIError as error:
                chunks.append(error)

        threads.append(threading.Thread(target=take, daemon=True))
        threads[-1].start()
        taken.append(chunks)
    until(lambda: all(len(chunks) >= 2 for chunks in taken))
    return threads, taken


def test_ready_is_one_line_and_each_request_another(run: Callable[..., Process]) -> None:
    server = run("--port", "0").ready()
    assert server.lines == [f"serving fake on http://127.0.0.1:{server.port} (Ctrl-C stops)\n"]
    assert server.client().chat.completions.create(model="fake", messages=[{"role": "user", "content": "a secret"}])
    line = json.loads(until(lambda: server.lines[1:])[0])
    assert line["path"] == "/v1/chat/completions" and line["status"] == 200
    assert "secret" not in "".join(server.lines)
    server.process.terminate()
    assert server.end() == 0
    assert len(server.lines) == 2


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_under_load_finishes_what_runs(run: Callable[..., Process], name: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    server = run("--port", "0", "--log-level", "error", FAKE_HOLD=str(go)).ready()
    threads, taken = streams(server, "hello", 5)
    server.process.send_signal(getattr(signal, name))
    http = httpx.Client(base_url=server.url, timeout=SECONDS)
    answer = until(lambda: (got := http.get("/health")).status_code == 503 and got)
    assert answer.json()["error"]["code"] == "draining"
    refused = http.post("/v1/chat/completions", json={"model": "fake", "messages": [{"role": "user", "content": "a"}]})
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert "dgemma_ready 0.0" in http.get("/metrics").text
    go.touch()
    for thread in threads:
        thread.join(SECONDS)
    assert [chunks[-1].choices[0].finish_reason for chunks in taken] == ["stop"] * 5
    assert server.end() == 0
    assert len(server.lines) == 1


@posix
def test_the_drain_has_a_limit(run: Callable[..., Process]) -> None:
    server = run("--port", "0", "--drain-seconds", "0.4", "--log-level", "error", FAKE_HOLD="/nowhere/at/all").ready()
    threads, taken = streams(server, "hello", 3)
    server.process.terminate()
    for thread in threads:
        thread.join(SECONDS)
    assert [chunks[-1].code for chunks in taken] == ["draining"] * 3
    assert server.end() == 0


@posix
def test_a_second_signal_ends_at_once(run: Callable[..., Process]) -> None:
    server = run("--port", "0", "--drain-seconds", "9999", "--log-level", "error", FAKE_HOLD="/nowhere/at/all").ready()
    threads, taken = streams(server, "hello", 2)
    server.process.send_signal(signal.SIGINT)
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130
    for thread in threads:
        thread.join(SECONDS)
    assert all(isinstance(chunks[-1], openai.APIError) or not chunks[-1].choices[0].finish_reason for chunks in taken)


@posix
def test_a_signal_while_loading(run: Callable[..., Process]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = run("--port", str(port), "--log-level", "error", FAKE_LOADING="60")

    def health() -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code
        except httpx.ConnectError:
            return 0

    until(lambda: health() == 503)
    server.process.terminate()
    assert server.end() == 0 and server.lines == []


@posix
def test_killed_and_started_again(run: Callable[..., Process]) -> None:
    """The port is free at once, and what was kept in memory is plainly not there."""
    first = run("--port", "0", "--log-level", "error").ready()
    kept = first.client().responses.create(model="fake", input="a")
    threads, _ = streams(first, "LONG", 2)
    first.process.kill()
    for thread in threads:
        thread.join(SECONDS)
    second = run("--port", str(first.port), "--log-level", "error").ready()
    with pytest.raises(openai.NotFoundError) as caught:
        second.client().responses.create(model="fake", input="b", previous_response_id=kept.id)
    assert caught.value.param == "previous_response_id" and "restart" in caught.value.message
    assert second.client().responses.create(model="fake", input="b").output_text


def test_a_port_in_use(run: Callable[..., Process]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = run("--port", str(port))
        assert server.end() == 2
    (line,) = server.lines
    assert line.startswith(f"error: --port: {port} on 127.0.0.1 ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "error: nowhere: no such directory\n"),
        (["--host", "no.such.host.invalid"], "error: --host: "),
    ],
)
def test_a_start_that_fails(run: Callable[..., Process], arguments: list[str], said: str) -> None:
    server = run("--port", "0", *arguments)
    assert server.end() == 2
    (line,) = server.lines
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--host", "a b"),
        ("--host", ""),
        ("--port", "70000"),
        ("--port", "-1"),
        ("--api-key", " "),
        ("--api-key", "schlüssel"),
        ("--max-batch", "0"),
        ("--max-queue", "x"),
        ("--max-model-len", "0"),
        ("--timeout", "0"),
        ("--drain-seconds", "-1"),
        ("--max-body", "0"),
        ("--log-level", "loud"),
    ],
)
def test_bad_arguments(flag: str, value: str) -> None:
    result = CliRunner().invoke(app, ["serve", flag, value])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {flag}: ") and result.stderr.count("\n") == 1


@posix
def test_other_machines_only_when_told(run: Callable[..., Process]) -> None:
    server = run("--host", "0.0.0.0", "--port", "0", DGEMMA_API_KEY="").ready()
    assert server.lines[0].startswith("warning: --host: 0.0.0.0 ")
    locked = run("--host", "0.0.0.0", "--port", "0", DGEMMA_API_KEY="k").ready()
    assert len(locked.lines) == 1
    assert httpx.get(f"{locked.url}/v1/models").status_code == 401
    right = httpx.get(f"{locked.url}/v1/models", headers={"authorization": "Bearer k"})
    assert right.status_code == 200
