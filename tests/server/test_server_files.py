"""`/v1/files` by the official client, and what neither files nor batches can be."""

from __future__ import annotations

import errno
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from batches import CHAT, LONG, content, create, ended, line, upload
from click.testing import CliRunner
from servers import Running, launch, until

import dgemma
from dgemma.cli.app import app
from dgemma.errors import ConfigError
from dgemma.server import runner
from dgemma.server.data import DataFolder
from dgemma.server.service import Service
from dgemma.server.settings import ServerSettings


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


def test_the_same_on_the_command_line(nonsense: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    done = CliRunner().invoke(app, ["serve", "--model", str(nonsense), "--data-dir", str(tmp_path / "a file" / "x")])
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
