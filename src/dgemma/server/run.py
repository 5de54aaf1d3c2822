"""A server from its start to its end: the port first, then the model, then requests, then a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..errors import ConfigError
from .app import create_app
from .service import Service
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..api import Model

DONE, INTERRUPTED = 0, 130
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that none is closed under a request
LAST_SECONDS = 5.0  # what a cancelled request gets to say so


class Server(uvicorn.Server):
    """uvicorn's server with a drain: the first signal lets running requests finish, the second ends at once.

    Fields:
        failure: what loading the model raised; the server has stopped then.
        interrupted: whether there was a second signal.
    """

    def __init__(self, service: Service, load: Callable[[], Model], on_ready: Callable[[Model], None]):
        # Everything that uvicorn would configure by itself is said here.
        config = uvicorn.Config(
            create_app(service),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(LAST_SECONDS),
        )
        super().__init__(config)
        self.service, self._load, self._on_ready = service, load, on_ready
        self.failure: BaseException | None = None
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then has the model loaded while `/health` says so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._load_model, name="load", daemon=True).start()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Our own handlers, where signals can be had."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain, or stop at once if that is under way."""
        if self.service.state == "draining":
            self.interrupted = self.force_exit = self.should_exit = True
            if self.service.jobs:
                self._loop.call_soon_threadsafe(self._cut)
        else:
            self.drain()

    def drain(self) -> None:
        """Takes no new requests, lets running ones finish within the limit, then stops. From any thread."""
        self.service.state = "draining"
        self.service.batches.stop()
        if self.service.model is None:
            self.should_exit = True
        else:
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        model = self.service.model
        assert model is not None
        model.drain(self.service.settings.drain_seconds)
        with contextlib.suppress(RuntimeError):  # the loop is closed: a second signal came
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    def _cut(self) -> None:
        for job in list(self.service.jobs):
            job.cancel()

    async def _end(self) -> None:
        self._cut()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                while self.service.open_requests:
                    await asyncio.sleep(0.02)
        self.should_exit = True

    def _load_model(self) -> None:
        try:
            model = self._load()
            model.start()
        except BaseException as error:
            self.failure, self.should_exit = error, True
            return
        self.service.ready(model)
        if self.service.state == "ready":
            self._on_ready(model)


def serve(
    settings: ServerSettings,
    load: Callable[[], Model],
    *,
    on_ready: Callable[[Model, str], None],
) -> int:
    """Serves until a signal comes.

    Args:
        load: gives the model; called in a thread when the port is open.
        on_ready: called with the model and the server's address when requests are taken.

    Returns:
        0 after a graceful stop, 130 after one that a second signal cut short.

    Raises:
        ConfigError: the host is unknown, the port is taken, or the data folder cannot be used.
        BaseException: what `load` raised.
    """
    service = Service(settings)
    try:
        listener = listen(settings)
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        server = Server(service, load, lambda model: on_ready(model, address))
        try:
            server.run(sockets=[listener])
        finally:
            listener.close()
    finally:
        service.close()
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        return INTERRUPTED
    if service.model is not None:
        service.model.close()
    return DONE


def listen(settings: ServerSettings) -> socket.socket:
    """An open port.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(f"host: {settings.host!r} is not the name or address of this machine") from None
    family, kind, protocol, _, place = found[0]
    # asyncio sends small writes at once only where the protocol is named.
    listener = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _watch(listener, settings.stall_seconds)
        listener.bind(place)
        listener.listen(128)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"port: {settings.port} on {settings.host} cannot be had ({reason}); choose another"
        ) from None
    return listener


def _watch(listener: socket.socket, stall_seconds: float) -> None:
    """Has the kernel end connections to clients that vanished without a word or read nothing; accepted ones inherit."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": int(stall_seconds * 1000)}
    for name, value in options.items():
        if hasattr(socket, name):
            with contextlib.suppress(OSError):  # not every kernel knows all of them
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
