"""`/v1/batches` by the official client, on a small random network and the real engine: what becomes of one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from batches import CHAT, FAKES, LONG, SOURCE, content, create, ended, line, said, upload
from servers import Running, until

from dgemma.params import SamplingParams
from dgemma.server import runner

LONGEST = SamplingParams(max_new_tokens=900, min_tokens=900)


def assert_counted(batch: Any, answers: dict[str, Any]) -> None:
    """The batch's usage is the sum of its answers'; a random network may think a token or two."""
    usages = [one["response"]["body"]["usage"] for one in answers.values()]
    read = [usage.get("prompt_tokens", usage.get("input_tokens")) for usage in usages]
    given = [usage.get("completion_tokens", usage.get("output_tokens")) for usage in usages]
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (sum(read), sum(given))
    assert batch.usage.total_tokens == sum(read) + sum(given) > 0
    details = [usage.get("completion_tokens_details", usage.get("output_tokens_details")) for usage in usages]
    assert batch.usage.output_tokens_details.reasoning_tokens == sum(one["reasoning_tokens"] for one in details)


def test_a_batch_from_its_upload_to_its_end(begin: Callable[..., Running], tmp_path: Path) -> None:
    server = begin()
    client = server.client()
    assert client.files.list().data == [] == client.batches.list().data and not (tmp_path / "data").exists()
    good = [line(number, f"word {number}", seed=number if number % 2 else None) for number in range(8)]
    bad = [
        "{",
        line(3),
        {**line(9), "method": "GET"},
        line(10, url="/v1/completions"),
        line(11, model="other"),
        line(12, stream=True),
        line(13, temperature=9),
    ]
    file = upload(client, [*good, *bad])
    assert (file.object, file.filename, file.purpose, file.status) == ("file", "in.jsonl", "batch", "processed")
    assert client.files.retrieve(file.id) == file and file.bytes == len(client.files.content(file.id).content)
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"purpose": "a test"}
    )
    assert batch.object == "batch" and batch.status == "validating" and batch.expires_at == batch.created_at + 86400
    with pytest.raises(openai.BadRequestError, match="cancel that first"):
        client.files.delete(file.id)
    done = ended(client, batch)
    assert (done.status, done.metadata, done.model) == ("completed", {"purpose": "a test"}, "tiny")
    assert done.completed_at >= done.finalizing_at >= done.in_progress_at >= done.created_at
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (15, 8, 7)
    answers, errors = content(client, done.output_file_id), content(client, done.error_file_id)
    assert set(answers) == {f"r{number}" for number in range(8)}
    assert_counted(done, answers)
    assert batch.usage is None and done.usage.input_tokens_details.cached_tokens >= 0
    for number in (1, 3, 5):
        response = server.http.post(CHAT, json=good[number]["body"]).json()
        assert said(answers[f"r{number}"]) == response["choices"][0]["message"]["content"]
    reasons = {name: (one["error"] or one["response"]["body"]["error"]) for name, one in errors.items()}
    assert {name: error.get("param") for name, error in reasons.items()} == {
        None: None,
        "r3": "custom_id",
        "r9": "method",
        "r10": "url",
        "r11": "model",
        "r12": "stream",
        "r13": "temperature",
    }
    made = client.files.list(purpose="batch_output").data
    assert {one.id for one in made} == {done.output_file_id, done.error_file_id}
    assert client.files.delete(done.output_file_id).deleted and client.files.delete(file.id).deleted
    for gone in (done.output_file_id, file.id):
        for attempt in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                attempt(gone)
    assert client.batches.retrieve(batch.id) == done
    assert sorted(path.name for path in (tmp_path / "data" / "files").iterdir()) == [done.error_file_id]
    assert list((tmp_path / "data" / "batches").iterdir()) == []


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/responses"])
def test_other_endpoints(begin: Callable[..., Running], url: str) -> None:
    client = begin().client()
    more = {"max_output_tokens": 6, "max_tokens": None} if url == "/v1/responses" else {}
    lines = [line(number, url=url, **more) for number in range(3)]
    for one in lines:
        one["body"] = {name: value for name, value in one["body"].items() if value is not None}
    lines.append(line(3, url=url, previous_response_id="resp_1", **more))
    done = ended(client, create(client, lines, url))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 3, 1)
    assert_counted(done, content(client, done.output_file_id))
    for one in content(client, done.output_file_id).values():
        assert one["response"]["body"]["object"] == ("response" if url == "/v1/responses" else "text_completion")


def test_cancelling(begin: Callable[..., Running]) -> None:
    """What is done stays; a batch that has not begun ends at once; one that is over cannot be ended."""
    client = begin().client()
    running = create(client, [line(0), *[line(number, **LONG) for number in range(1, 40)]])
    waiting = create(client, [line(0)])
    until(lambda: client.batches.retrieve(running.id).request_counts.completed)
    assert client.batches.cancel(waiting.id).status == "cancelled"
    assert client.batches.cancel(running.id).status == "cancelling"
    done = ended(client, running)
    assert done.status == "cancelled" and done.cancelled_at >= done.cancelling_at
    answers = content(client, done.output_file_id)
    assert len(answers) == done.request_counts.completed < 40 and "r0" in answers
    none = client.batches.retrieve(waiting.id)
    assert (none.output_file_id, none.error_file_id, none.usage) == (None, None, None)
    assert_counted(done, answers)
    for batch in (running, waiting):
        with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
            client.batches.cancel(batch.id)
    assert ended(client, create(client, [line(0)])).status == "completed"


def test_cancelling_while_the_line_is_full(begin: Callable[..., Running]) -> None:
    """It takes no place in it, and does not wait for one."""
    server = begin()
    client = server.client()
    waiting = [server.model.submit("hello", LONGEST) for _ in range(4 + 64)]
    batch = create(client, [line(number) for number in range(5)])
    until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    time.sleep(0.2)
    client.batches.cancel(batch.id)
    started = time.monotonic()
    done = ended(client, batch)
    assert (done.status, done.request_counts.completed, done.output_file_id) == ("cancelled", 0, None)
    assert time.monotonic() - started < 5
    status = server.model.status()
    assert status.queued + status.running > 60  # it is still as full
    for ticket in waiting:
        ticket.cancel()
    assert ended(client, create(client, [line(0)])).status == "completed"


def test_a_restart_in_the_middle(begin: Callable[..., Running]) -> None:
    """The next server goes on where the first one ended; every request is answered once, and as it would have been."""
    first = begin()
    client = first.client()
    lines = [line(number, f"word {number}", seed=number, max_tokens=30) for number in range(40)]
    batch, later = create(client, lines), create(client, [line(0)])
    begun = until(lambda: (now := client.batches.retrieve(batch.id)).request_counts.completed and now)
    first.server.drain()  # does not wait for the batch
    first.thread.join(10)
    first.stop()
    server = begin()
    client = server.client()
    assert client.batches.retrieve(batch.id).status in ("in_progress", "validating", "completed")
    done = ended(client, batch)
    assert done.status == "completed" and done.request_counts.completed == 40
    assert done.in_progress_at == begun.in_progress_at
    answers = content(client, done.output_file_id)
    assert len(answers) == 40
    assert_counted(done, answers)  # those of both servers
    for number in (0, 17, 39):
        response = server.http.post(CHAT, json=lines[number]["body"]).json()
        assert said(answers[f"r{number}"]) == response["choices"][0]["message"]["content"]
    assert ended(client, later).status == "completed"
    assert [one.id for one in client.batches.list().data] == [later.id, batch.id]


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    """kill -9, twice: every request is answered once in the end, those with seeds as they always are."""
    process: Any = None
    lines = [{**line(number, f"say {number}", seed=number), "body": {}} for number in range(300)]
    for number, one in enumerate(lines):
        one["body"] = {"model": "demo", "messages": [{"role": "user", "content": f"say {number}"}], "seed": number}

    def begin() -> openai.OpenAI:
        nonlocal process
        process = subprocess.Popen(
            [sys.executable, FAKES, "serve", "--port", "0", "--data-dir", str(tmp_path / "data")],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": SOURCE, "FAKE_DELAY": "0.1"},
            text=True,
        )
        ready = next(one for one in process.stderr if one.startswith("serving "))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        url = ready.split(" on ")[1].split(" (")[0]
        return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    try:
        client = begin()
        batch = create(client, lines)
        for least in (20, 100):
            until(lambda now=client, least=least: now.batches.retrieve(batch.id).request_counts.completed >= least)
            process.kill()
            process.wait()
            client = begin()
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 300, 0)
        answers = content(client, done.output_file_id)
        assert len(answers) == 300
        for number in (0, 150, 299):
            alone = client.chat.completions.create(**lines[number]["body"]).choices[0].message.content
            assert said(answers[f"r{number}"]) == alone
    finally:
        process.kill()
        process.wait()


def test_those_who_wait_go_first(begin: Callable[..., Running]) -> None:
    """A batch leaves places in the engine: a chat comes through long before it is done."""
    server = begin()
    client = server.client()
    batch = create(client, [line(number, **LONG) for number in range(12)])
    until(lambda: server.model.status().running)
    most = 0
    for _ in range(5):
        status = server.model.status()
        most = max(most, status.running + status.queued)
        time.sleep(0.05)
    assert most <= 3  # of four
    server.http.post(CHAT, json=line(0)["body"]).raise_for_status()
    now = client.batches.retrieve(batch.id)
    assert now.status == "in_progress" and now.request_counts.completed < 12
    client.batches.cancel(batch.id)
    assert ended(client, batch).status == "cancelled"


def test_the_window(begin: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """What there was no time for is in the errors file."""
    monkeypatch.setattr(runner, "WINDOW_SECONDS", 3)
    client = begin().client()
    batch = create(client, [line(0), "{", *[line(number, **LONG) for number in range(2, 60)]])
    done = ended(client, batch)
    assert done.status == "expired" and done.expired_at >= batch.expires_at
    answers, errors = content(client, done.output_file_id), content(client, done.error_file_id)
    assert len(answers) + len(errors) == 60 == done.request_counts.total
    assert {errors[name]["error"]["code"] for name in errors if name} == {"batch_expired"}
    assert done.request_counts.failed == len(errors) > 1
