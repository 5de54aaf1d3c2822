"""Real servers on real ports, in threads of this process."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai

from dgemma.server.run import Server, listen
from dgemma.server.service import Service
from dgemma.server.settings import ServerSettings

SECONDS = 60.0  # for what is a matter of milliseconds on an idle machine


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Server
    model: Any
    url: str
    thread: threading.Thread

    @cached_property
    def http(self) -> httpx.Client:
        """A plain client; making one takes much longer than using it."""
        return httpx.Client(base_url=self.url, timeout=SECONDS)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.url.rpartition(":")[2])

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client, without second tries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})

    def stop(self) -> None:
        """Ends it."""
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        self.server.service.close()


def launch(model: Any, *, send_buffer: int | None = None, **settings: Any) -> Running:
    """A server on a free port that is ready; without a folder for files, unless one is named.

    `send_buffer`: bytes that the kernel keeps for a reader.
    """
    nowhere = Path(tempfile.gettempdir()) / f"dgemma-{uuid.uuid4().hex}"
    chosen = ServerSettings(**{"port": 0, "data_dir": nowhere, **settings})
    listener = listen(chosen)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready = threading.Event()
    server = Server(Service(chosen), lambda: model, lambda _: ready.set())
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert ready.wait(SECONDS)
    return Running(server, model, f"http://127.0.0.1:{listener.getsockname()[1]}", thread)


def until(true: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `true` returns once it is true."""
    limit = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.005)
    return value
