"""Several processes that answer, each with a model of its own: one a GPU, or one a core where the model is small."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from .answer import Answerer, Outcome, try_defaults
from .form import Form, Request
from .source import Record
from .weights import weights

if TYPE_CHECKING:
    from ..api import Model

Loader = Callable[[], "Model"]
TICK = 0.2  # seconds at most between two looks at whether there is more to do
END = "end"
PATIENCE = 10.0  # seconds that a process gets to end


class WorkerLost(RuntimeError):
    """A process that answered has ended by itself, or by another's hand."""


class _Worker:
    """One process, as the others see it: what it was sent, and what it has given back."""

    def __init__(self, number: int, loader: Loader, form: Form, ahead: int | None, news: SimpleQueue[Any]):
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the GPU's state
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, loader, form, ahead), name=f"dgemma-worker-{number}", daemon=True
        )
        self.process.start()
        theirs.close()
        self.number, self.most = number, 0
        self.sent = self.got = self.held = 0
        # What it says is read at once, so that it never waits for us while we wait for it.
        threading.Thread(target=self._listen, args=(news,), daemon=True).start()

    @property
    def open(self) -> int:
        """Requests that it has and will say something of without being asked."""
        return self.sent - self.got - self.held

    def say(self, message: Any) -> None:
        """Sends it something; that it has gone is found out by listening."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def _listen(self, news: SimpleQueue[Any]) -> None:
        while True:
            try:
                news.put((self, self.connection.recv()))
            except (EOFError, OSError):
                news.put((self, None))
                return


class Pool:
    """What `Answerer` is, by many processes: requests in, outcomes out, whichever is done first.

    Args:
        loaders: one a process, which is where they are called; they are pickled.
        ahead: answers under way at most in each.
    """

    def __init__(self, loaders: Sequence[Loader], form: Form, ahead: int | None = None):
        self._news: SimpleQueue[tuple[_Worker, Any]] = SimpleQueue()
        self._ready: list[Outcome] = []
        self._workers: list[_Worker] = []
        try:
            for number, loader in enumerate(loaders):
                self._workers.append(_Worker(number, loader, form, ahead, self._news))
        except BaseException:
            self.close()
            raise

    def wait(self, tick: Callable[[], bool]) -> str | None:
        """Waits until all have loaded; returns a digest of the first one's weights, None if `tick` said to stop.

        Args:
            tick: called now and then; True ends the waiting.

        Raises:
            WorkerLost: a process ended; and whatever a loader raised.
        """
        waiting, digest = len(self._workers), None
        while waiting:
            if tick():
                return None
            message = self._next(TICK)
            if message is None:
                continue
            worker = message[0]
            worker.most, own, said = message[1]
            waiting -= 1
            if not worker.number:
                digest = own
                for text in said:
                    warnings.warn(text, stacklevel=2)
        return digest

    def __len__(self) -> int:
        return sum(worker.open for worker in self._workers) + len(self._ready)

    @property
    def held(self) -> int:
        """See `Answerer.held`."""
        return sum(worker.held for worker in self._workers)

    @property
    def full(self) -> bool:
        """Whether all of them have enough to do."""
        return all(worker.open >= worker.most for worker in self._workers)

    def submit(self, request: Request) -> None:
        """Gives a request to whoever has the least to do."""
        worker = min(self._workers, key=lambda one: one.open / one.most)
        worker.sent += 1
        worker.say(Record(request.line, request.data))

    def next(self, timeout: float | None = None) -> Outcome | None:
        """See `Answerer.next`.

        Raises:
            WorkerLost: a process ended; and whatever its engine raised.
        """
        if not self._ready:
            message = self._next(timeout)
            if message is None:
                return None
            worker = message[0]
            worker.held, outcomes = message[1]
            worker.got += len(outcomes)
            self._ready += outcomes
        return self._ready.pop() if self._ready else None

    def rest(self) -> list[Outcome]:
        """See `Answerer.rest`."""
        for worker in self._workers:
            if worker.held:
                worker.say(None)
        rest = []
        while self.held:
            outcome = self.next()
            if outcome is not None:
                rest.append(outcome)
        rest, self._ready = rest + self._ready, []
        return rest

    def close(self) -> None:
        """Ends the processes, at the next step of each; what is under way is lost."""
        for worker in self._workers:
            worker.say(END)
        for worker in self._workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _next(self, timeout: float | None) -> tuple[_Worker, Any] | None:
        try:
            worker, message = self._news.get(timeout=timeout)
        except Empty:
            return None
        if message is None:
            worker.process.join(PATIENCE)
            code = worker.process.exitcode
            ended = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            raise WorkerLost(f"worker {worker.number + 1} of {len(self._workers)} ended {ended}; was its memory full?")
        if isinstance(message, BaseException):
            raise message
        return worker, message


def _work(connection: Connection, loader: Loader, form: Form, ahead: int | None) -> None:
    """The life of a process that answers; it ends when whoever began it has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # who began it gets them too, and ends it
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = loader()
            try_defaults(model, form)
            answerer = Answerer(model, form, ahead)
        connection.send((answerer.ahead, weights(model.directory), [str(one.message) for one in said]))
        while True:
            while not answerer.full and connection.poll(0 if len(answerer) else None):
                message = connection.recv()
                if message == END:
                    return
                if message is None:
                    connection.send((0, answerer.rest()))
                else:
                    answerer.take(message)
            outcome = answerer.next(TICK)
            if outcome is not None or answerer.held:
                connection.send((answerer.held, [] if outcome is None else [outcome]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(portable(error))


def portable(error: Exception) -> Exception:
    """The error, if it survives being sent; else one of the same words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
