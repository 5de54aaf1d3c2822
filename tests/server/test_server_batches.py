"""`/v1/files` and `/v1/batches` by the official client, on a small random network and the real engine."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner

import dgemma
from conftest import Running, launch, until
from dgemma.checkpoint import save_checkpoint
from dgemma.cli.app import app
from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.errors import ConfigError
from dgemma.model import Network
from dgemma.params import GenerationConfig
from dgemma.server import runner
from dgemma.server.data import DataFolder
from dgemma.server.service import Service
from dgemma.server.settings import ServerSettings
from dgemma.train import recipes

FAKES = str(Path(__file__).parents[1] / "batch" / "fakes.py")
SOURCE = str(Path(dgemma.__file__).parents[1])
CHAT, ENDED = "/v1/chat/completions", ("completed", "failed", "cancelled", "expired")
SHORT = {"max_tokens": 6, "diffusion": {"max_denoising_steps": 2}}
LONG = {"max_tokens": 800, "diffusion": {"min_tokens": 800, "max_denoising_steps": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that writes nonsense, in canvases of 16 tokens."""
    text = {
        **recipes.DEMO_CONFIG["text_config"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "sliding_window": 8,
        "max_position_embeddings": 1024,
    }
    config = ModelConfig.from_dict({**recipes.DEMO_CONFIG, "canvas_length": 16, "text_config": text})
    network = Network(config)
    recipes.initialize(network, 0)
    path = tmp_path_factory.mktemp("nonsense")
    generation = GenerationConfig(max_new_tokens=40, max_denoising_steps=4, eos_token_ids=(1, 106), pad_token_id=0)
    save_checkpoint(network, config, path, generation=generation, text_files=Path(dgemma.__file__).parent / "demo")
    return path


@pytest.fixture
def begin(directory: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers, four requests at a time, on one data folder."""
    servers: list[Running] = []

    def go(**settings: Any) -> Running:
        engine = dgemma.EngineSettings(max_batch=4, max_queue=64)
        model = dgemma.load(directory, engine=engine)
        model.name = "tiny"
        servers.append(launch(model, **{"data_dir": tmp_path / "data", **settings}))
        return servers[-1]

    yield go
    for one in servers:
        one.stop()
        one.model.close()


def line(number: int, content: str = "hello", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """One request."""
    own: dict[str, Any] = {"model": "tiny", **SHORT, **body}
    own |= {CHAT: {"messages": [{"role": "user", "content": content}]}, "/v1/completions": {"prompt": content}}.get(
        url, {"input": content}
    )
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": own}


def upload(client: openai.OpenAI, lines: list[Any], **more: Any) -> Any:
    """A file of them; texts are lines as they are."""
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch", **more)


def create(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Any:
    """A batch of them."""
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    """The batch when it is over."""

    def look() -> Any:
        now = client.batches.retrieve(batch.id)
        assert now.request_counts.completed + now.request_counts.failed <= max(1, now.request_counts.total)
        return now if now.status in ENDED else None

    return until(look)


def content(client: openai.OpenAI, name: str | None) -> dict[str, Any]:
    """The lines of an output, by `custom_id`."""
    if name is None:
        return {}
    lines = [json.loads(one) for one in client.files.content(name).text.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


def said(one: dict[str, Any]) -> str:
    """What a line of an output says."""
    assert one["response"]["status_code"] == 200 and one["error"] is None
    return one["response"]["body"]["choices"][0]["message"]["content"]


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
    assert (none.output_file_id, none.error_file_id) == (None, None)
    for batch in (running, waiting):
        with pytest.raises(openai.ConflictError, match="cannot be cancelled"):
            client.batches.cancel(batch.id)
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


def test_a_file_that_is_no_batch(begin: Callable[..., Running], tmp_path: Path) -> None:
    client = begin().client()
    done = ended(client, create(client, ["not json", "[1]", ""]))
    assert (done.status, done.request_counts.total, done.request_counts.failed) == ("completed", 2, 2)
    codes = [
        one["error"]["code"] for one in map(json.loads, client.files.content(done.error_file_id).text.splitlines())
    ]
    assert codes == ["invalid_json", "invalid_type"]


def test_another_model_after_a_restart(begin: Callable[..., Running], tmp_path: Path) -> None:
    """A batch that another model has begun fails, keeps what was answered, and says nothing of the server's folders."""
    first = begin()
    batch = create(first.client(), [line(number, **LONG) for number in range(30)])
    until(lambda: first.client().batches.retrieve(batch.id).request_counts.completed)
    first.stop()
    model = dgemma.load(first.model.directory)
    model.name = "other"
    server = launch(model, data_dir=tmp_path / "data")
    done = ended(server.client(), batch)
    assert done.status == "failed" and done.failed_at
    (error,) = done.errors.data
    assert "model" in error.message and "other" in error.message and str(tmp_path) not in error.message
    assert len(content(server.client(), done.output_file_id)) > 0
    server.stop()
    model.close()


@pytest.mark.parametrize(
    ("files", "data", "param", "status"),
    [
        ({"file": b"{}"}, {}, "purpose", 400),
        ({"file": b"{}"}, {"purpose": "fine-tune"}, "purpose", 400),
        ({"file": b"{}"}, {"purpose": "batch", "color": "red"}, "color", 400),
        ({"file": b"{}"}, {"purpose": ["batch", "batch"]}, "purpose", 400),
        ({"file": b""}, {"purpose": "batch"}, "file", 400),
        ({"other": b"{}"}, {"purpose": "batch"}, "other", 400),
        ({"purpose": b"batch", "file": b""}, {}, None, 400),
        ({"file": b"x" * 1001}, {"purpose": "batch"}, "file", 413),
        ({"file": b"x" * 100_000}, {"purpose": "batch"}, None, 413),
        ({"file": b"{}"}, {"purpose": "batch" * 20_000}, None, 413),
        ({"file": b"{}"}, {"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after[seconds]", 400),
        ({"file": b"{}"}, {"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after[anchor]", 400),
        (
            {"file": b"{}"},
            {"purpose": "batch", "expires_after[seconds]": "60", "expires_after[anchor]": "created_at"},
            "expires_after[seconds]",
            400,
        ),
        (
            {"file": b"{}"},
            {"purpose": "batch", "expires_after[seconds]": "1e4", "expires_after[anchor]": "created_at"},
            "expires_after[seconds]",
            400,
        ),
    ],
)
def test_uploads_that_are_refused(
    begin: Callable[..., Running], tmp_path: Path, files: Any, data: Any, param: str | None, status: int
) -> None:
    server = begin(max_file_bytes=1000)
    answer = server.http.post("/v1/files", files=files, data=data)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert not (tmp_path / "data").exists()


def test_other_bodies_are_refused(begin: Callable[..., Running]) -> None:
    http = begin().http
    assert http.post("/v1/files", json={"purpose": "batch"}).status_code == 415
    kinds = ["multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary=\x80"]
    for kind in kinds:
        headers = {"content-type": kind.encode("latin-1")}
        for body in (b"", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", b"\xff" * 100):
            answer = http.post("/v1/files", content=body, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 400, (kind, body, answer.text)


@pytest.mark.parametrize(
    ("more", "param", "status"),
    [
        ({"input_file_id": "file-x"}, "input_file_id", 404),
        ({"input_file_id": 3}, "input_file_id", 400),
        ({"endpoint": "/v1/embeddings"}, "endpoint", 400),
        ({"completion_window": "1h"}, "completion_window", 400),
        ({"metadata": {"a": 1}}, "metadata.a", 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds", 400),
        ({"color": "red"}, "color", 400),
    ],
)
def test_batches_that_are_refused(begin: Callable[..., Running], more: Any, param: str, status: int) -> None:
    server = begin()
    file = upload(server.client(), [line(0)])
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **more}
    answer = server.http.post("/v1/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert server.client().batches.list().data == []


def test_an_output_is_no_input(begin: Callable[..., Running]) -> None:
    client = begin().client()
    done = ended(client, create(client, [line(0)]))
    with pytest.raises(openai.BadRequestError, match="purpose batch_output"):
        client.batches.create(input_file_id=done.output_file_id, endpoint=CHAT, completion_window="24h")


def test_lists(begin: Callable[..., Running]) -> None:
    server = begin()
    client = server.client()
    names = [upload(client, [line(number)]).id for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == names[::-1]  # page after page
    assert [file.id for file in client.files.list(order="asc", after=names[1], limit=1)] == names[2:]
    page = server.http.get("/v1/files", params={"limit": 2}).json()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, names[4], names[3])
    assert client.files.list(purpose="batch_output").data == []
    batches = [create(client, [line(0)]).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=1)] == batches[::-1]
    for path, param in (
        ("/v1/files?limit=0", "limit"),
        ("/v1/files?limit=10001", "limit"),
        ("/v1/files?order=up", "order"),
        ("/v1/files?color=red", "color"),
        ("/v1/files?limit=1&limit=2", "limit"),
        ("/v1/files?after=file-x", "after"),
        ("/v1/batches?limit=101", "limit"),
        ("/v1/batches?order=asc", "order"),
        ("/v1/batches?after=x", "after"),
    ):
        answer = server.http.get(path)
        assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, path
    for path in ("/v1/batches/x", "/v1/batches/%2e%2e", "/v1/files/x", "/v1/files/%2e%2e%2fstate.sqlite/content"):
        assert server.http.get(path).status_code == 404
    assert server.http.post("/v1/batches/x/cancel").status_code == 404


def test_files_expire(begin: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = begin()
    client = server.client()
    kept = upload(client, [line(0)])
    file = upload(client, [line(0)], expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600 and client.files.retrieve(kept.id).expires_at is None
    expiry: Any = {"anchor": "created_at", "seconds": 7200}
    done = ended(client, create(client, [line(0)], output_expires_after=expiry))
    output = client.files.retrieve(done.output_file_id)
    assert output.expires_at == output.created_at + 7200
    now = time.time()
    monkeypatch.setattr("dgemma.server.data.time.time", lambda: now + 3700)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert file.id not in [one.id for one in client.files.list()]
    server.server.service.data.sweep()
    left = {path.name for path in (tmp_path / "data" / "files").iterdir()}
    assert file.id not in left and {kept.id, output.id} <= left


def test_a_full_disk(begin: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An upload that does not fit is refused, and leaves nothing behind; a batch waits until there is room."""
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.2)
    client = begin().client()
    upload(client, [line(0)])
    whole = shutil.copyfileobj

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(openai.InternalServerError) as caught:
        upload(client, [line(0)])
    assert caught.value.status_code == 507 and caught.value.code == "insufficient_storage"
    assert "No space left" in caught.value.message and len(list((tmp_path / "data" / "files").iterdir())) == 1
    monkeypatch.setattr(shutil, "copyfileobj", whole)
    work, tried = runner.run, []

    def fails(*args: Any, **named: Any) -> Any:
        tried.append(1)
        if len(tried) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return work(*args, **named)

    monkeypatch.setattr(runner, "run", fails)
    assert ended(client, create(client, [line(0)])).status == "completed" and len(tried) == 3


def test_one_server_a_folder(begin: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is named must be free; of the user's own the first server has the use, and the others say so."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("dgemma.server.data.sys.platform", "linux")
    folder = tmp_path / "dgemma"
    first = begin(data_dir=None)
    assert not folder.exists()
    name = upload(first.client(), [line(0)]).id
    assert folder.is_dir()
    with pytest.raises(ConfigError, match=r"data_dir: .* is in use by another server"):
        Service(ServerSettings(data_dir=folder))
    second = begin(data_dir=None)
    assert second.client().files.list().data == []
    with pytest.raises(openai.InternalServerError, match="in use by another server") as caught:
        upload(second.client(), [line(0)])
    assert caught.value.status_code == 503
    second.http.post(CHAT, json=line(0)["body"]).raise_for_status()
    first.stop()
    third = begin(data_dir=None)
    assert [file.id for file in third.client().files.list()] == [name]
    (tmp_path / "a file").write_text("x")
    with pytest.raises(ConfigError, match=r"data_dir: .* cannot be used"):
        DataFolder(tmp_path / "a file")
    with pytest.raises(ConfigError, match=r"data_dir: .* cannot be made in"):
        DataFolder(tmp_path / "a file" / "below" / "it")


def test_the_same_on_the_command_line(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    done = CliRunner().invoke(app, ["serve", "--model", str(directory), "--data-dir", str(tmp_path / "a file" / "x")])
    assert done.exit_code == 2 and "--data-dir: " in done.output and "cannot be made" in done.output


def test_uploads_at_once(begin: Callable[..., Running]) -> None:
    """Many clients, one folder: every file is there, whole."""
    server = begin()
    bodies = [f"{number}\n".encode() * 20_000 for number in range(8)]
    names: dict[int, str] = {}

    def send(number: int) -> None:
        file = io.BytesIO(bodies[number])
        names[number] = server.client().files.create(file=("a/b\\c.jsonl", file), purpose="batch").id

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = server.client()
    assert [client.files.content(names[number]).content for number in range(8)] == bodies
    assert {file.filename for file in client.files.list()} == {"c.jsonl"}


def test_a_client_that_leaves_while_it_uploads(begin: Callable[..., Running], tmp_path: Path) -> None:
    server = begin()

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        httpx.post(
            f"{server.url}/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
    assert server.client().files.list().data == [] and not (tmp_path / "data").exists()
