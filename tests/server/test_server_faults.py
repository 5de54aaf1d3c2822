"""Clients that vanish, send half a body or stop reading: their places become free, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fake import FakeModel
from servers import SECONDS, Running, until

from dgemma.events import Commit, Draft, Finish, Result, Stats
from dgemma.protocol import ApiError
from dgemma.server.job import MOST_DRAFTS, Job
from dgemma.server.logs import Record


def request(path: str = "chat/completions", *, length: int = 0, **more: Any) -> bytes:
    """A raw request; `length` is added to what the header says of the body."""
    body: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "LONG"}], **more}
    data = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) + length}\r\n\r\n".encode() + data


def connect(server: Running, *, buffer: int | None = None) -> socket.socket:
    """A connection, with a receive buffer of that size."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(SECONDS)
    connection.connect(("127.0.0.1", server.port))
    return connection


def vanish(connection: socket.socket, how: str) -> None:
    """Leaves politely, or as a process that was killed with unread data does."""
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("more", [{"stream": True}, {}, {"n": 3, "stream": True}, {"n": 3}], ids=str)
def test_a_client_that_leaves_frees_its_place(start: Callable[..., Running], how: str, more: dict[str, Any]) -> None:
    """Within a step: here the step goes on for as long as nobody cancels it."""
    server = start(FakeModel(hold=2))
    connection = connect(server)
    connection.sendall(request(**more))
    tickets = until(lambda: len(server.model.tickets) == more.get("n", 1) and server.model.tickets)
    until(lambda: all(ticket.steps_done == 2 for ticket in tickets))
    vanish(connection, how)
    assert all(ticket.over.wait(SECONDS) and ticket.steps_done == 2 for ticket in tickets)
    until(lambda: not server.server.service.jobs and not server.server.service.open_requests)


def test_the_clients_own_way_to_leave(start: Callable[..., Running]) -> None:
    server = start(FakeModel(hold=6))
    long: Any = {"model": "fake", "messages": [{"role": "user", "content": "LONG"}]}
    early: Any = {"diffusion": {"early_text": "safe"}}
    stream = server.client().chat.completions.create(**long, stream=True, extra_body=early)
    for _ in range(3):
        next(stream)
    stream.close()

    async def give_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for count, asked in (
                (2, client.chat.completions.create(**long)),
                (3, client.responses.create(model="fake", input="LONG")),
            ):
                task = asyncio.ensure_future(asked)
                while len(server.model.tickets) < count:
                    await asyncio.sleep(0.005)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(give_up())
    assert len(server.model.tickets) == 3 and all(ticket.over.wait(SECONDS) for ticket in server.model.tickets)
    assert all(ticket.steps_done <= 6 for ticket in server.model.tickets)


def test_a_client_that_leaves_while_its_prompt_is_prepared(start: Callable[..., Running]) -> None:
    class Slow(FakeModel):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return super().submit(*arguments, **options)

    server = start(Slow())
    connection = connect(server)
    connection.sendall(request(stream=True, n=2))
    time.sleep(0.1)
    connection.close()
    tickets = until(lambda: len(server.model.tickets) == 2 and server.model.tickets)
    assert all(ticket.over.wait(SECONDS) for ticket in tickets)
    until(lambda: not server.server.service.jobs)


def test_half_a_body(start: Callable[..., Running]) -> None:
    server = start(body_seconds=0.5)
    gone = connect(server)
    gone.sendall(request(length=100))
    gone.close()
    waiting = connect(server)
    waiting.sendall(request(length=100))
    assert server.client().models.list().data  # meanwhile
    answer = b""
    while part := waiting.recv(65536):
        answer += part
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in answer
    assert not server.model.calls
    until(lambda: not server.server.service.open_requests)


def test_half_a_head(server: Running) -> None:
    for half in (
        b"",
        b"POST",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n",
        b"\x16\x03\x01\x02\x00",
        b"\0" * 9000,
    ):
        connection = connect(server)
        connection.sendall(half)
        connection.close()
    assert server.client().models.list().data


def test_a_reader_that_stops(start: Callable[..., Running]) -> None:
    """It holds up nobody, and in the end it is cut off. What is kept for it meanwhile: see drafts below."""
    server = start(FakeModel(canvas=256, context=10**9), stall_seconds=1.0, send_buffer=4096)
    connection = connect(server, buffer=4096)
    connection.sendall(request(stream=True, max_tokens=10**8, stream_options={"include_drafts": True}))
    assert connection.recv(100)
    other = server.client().chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}])
    assert other.choices[0].message.content
    assert server.model.tickets[0].over.wait(SECONDS) and server.model.tickets[0].cancelled_at
    until(lambda: not server.server.service.jobs and not server.server.service.open_requests)
    connection.close()


def test_a_slow_reader_gets_everything(start: Callable[..., Running]) -> None:
    """Text is never dropped, whatever becomes of drafts."""
    server = start(FakeModel(delay=0.0, context=10**9), send_buffer=4096)
    connection = connect(server, buffer=4096)
    connection.sendall(request(stream=True, seed=1, max_tokens=500, stream_options={"include_drafts": True}))
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += connection.recv(4096)
        time.sleep(0.0005)
    connection.close()
    events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    whole = server.client().chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "LONG"}], seed=1, max_tokens=500
    )
    assert text == whole.choices[0].message.content


def test_many_clients_at_once_some_of_which_leave(start: Callable[..., Running]) -> None:
    server = start(FakeModel(delay=0.005))
    texts: dict[int, str] = {}

    def stay(seed: int) -> None:
        answer = server.client().chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hello"}], seed=seed, stream=True
        )
        texts[seed] = "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    def leave() -> None:
        connection = connect(server)
        connection.sendall(request(stream=True))
        connection.recv(2000)
        connection.close()

    threads = [threading.Thread(target=stay, args=(seed % 3,)) for seed in range(6)]
    threads += [threading.Thread(target=leave) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for seed, text in texts.items():
        alone = server.client().chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hello"}], seed=seed
        )
        assert alone.choices[0].message.content == text
    assert len(texts) == 3
    assert all(ticket.over.wait(SECONDS) for ticket in server.model.tickets)


def test_small_writes_are_sent_at_once(server: Running) -> None:
    """Otherwise each event of a stream would wait for the client's word on the one before."""
    sockets = [one for listener in server.server.servers for one in listener.sockets]
    assert sockets and all(one.proto == socket.IPPROTO_TCP for one in sockets)
    connection = connect(server)
    (protocol,) = until(lambda: [one for one in server.server.server_state.connections if one.transport])[-1:]
    mine = protocol.transport.get_extra_info("socket")
    assert mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    connection.close()


def test_drafts_of_one_choice_do_not_push_out_anothers() -> None:
    """A job keeps the newest drafts of each choice, and everything that is no draft."""

    def ticket(count: int) -> Any:
        draft = {"canvas": 0, "max_steps": 9, "tokens": [], "text": "", "settled": [], "changed": [], "entropies": []}
        result = Result(text="", tokens=[], finish_reason="stop", seed=0, stats=Stats())

        class One:
            prompt_tokens = 1

            async def __aiter__(self) -> Any:
                for step in range(count):
                    yield Draft(step=step, mean_entropy=0.0, tokens_per_forward=0.0, **draft)  # type: ignore[arg-type]
                yield Finish(result=result)

            def cancel(self) -> None:
                pass

        return One()

    async def run() -> list[Any]:
        job = Job(
            [ticket(1000), ticket(3)],
            prompt_tokens=1,
            names={},
            record=Record(method="POST", path="/"),
            seconds=None,
            on_finish=lambda result: None,
            on_close=lambda job: None,
        )
        return [item async for item in job.events()]

    items = asyncio.run(run())
    steps = {index: [event.step for at, event in items if at == index and isinstance(event, Draft)] for index in (0, 1)}
    assert steps == {0: list(range(1000 - MOST_DRAFTS, 1000)), 1: [0, 1, 2]}
    assert sum(isinstance(event, Finish) for _, event in items) == 2


def test_a_deadline_holds_while_events_come_and_come() -> None:
    class Endless:
        prompt_tokens = 1

        async def __aiter__(self) -> Any:
            while True:
                await asyncio.sleep(0)
                yield Commit(canvas=0, steps=1, tokens=[1], text="a")

        def cancel(self) -> None:
            pass

    async def run() -> int:
        job = Job(
            [Endless()],  # type: ignore[list-item]
            prompt_tokens=1,
            names={},
            record=Record(method="POST", path="/"),
            seconds=0.1,
            on_finish=lambda result: None,
            on_close=lambda job: None,
        )
        count = 0
        with pytest.raises(ApiError) as caught:
            async for _ in job.events():
                count += 1
                await asyncio.sleep(0)
        job.close()
        assert caught.value.status == 504
        return count

    assert asyncio.run(run()) > 0
