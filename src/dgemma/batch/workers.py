"""Several processes that answer, each with a model of its own: one a GPU, or one a core where the model is small."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, WorkerLost
from .answer import Answerer, Outcome, try_defaults
from .deaths import Deaths
from .form import Form, Request
from .source import Record
from .weights import weights

if TYPE_CHECKING:
    from ..api import Model

Loader = Callable[[], "Model"]
TICK = 0.2  # seconds at most between two looks at whether there is more to do
END = "end"
PATIENCE = 10.0  # seconds that a process gets to end


class _Worker:
    """One process, as the others see it.

    Fields:
        most: requests that it has in line at most; 0 while it loads.
        given: those that it has, by line; held: how many of them wait to be asked for.
        tries: workers that these requests have cost so far. Above 0 it gets no others beside them.
    """

    def __init__(self, number: int, loader: Loader, form: Form, ahead: int | None, news: SimpleQueue[Any]):
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the GPU's state
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, loader, form, ahead), name=f"dgemma-worker-{number}", daemon=True
        )
        self.process.start()
        theirs.close()
        self.number, self.most, self.held, self.tries = number, 0, 0, 0
        self.given: dict[int, Record] = {}
        # What it says is read at once, so that it never waits for us while we wait for it.
        threading.Thread(target=self._listen, args=(news,), daemon=True).start()

    @property
    def open(self) -> int:
        """Requests that it has and will say something of without being asked."""
        return len(self.given) - self.held

    @property
    def full(self) -> bool:
        """Whether it has enough to do, or is to be left alone."""
        return bool(self.tries) or self.open >= self.most

    def give(self, record: Record) -> None:
        """One more request."""
        self.given[record.line] = record
        self.say(record)

    def ended(self) -> str:
        """How it did."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        return f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"

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

    Where a process dies another one begins in its place, and what it had is tried again (see `Deaths`).

    Args:
        loaders: one a process, which is where they are called; they are pickled.
        ahead: answers under way at most in each.
    """

    def __init__(self, loaders: Sequence[Loader], form: Form, ahead: int | None = None):
        self._news: SimpleQueue[tuple[_Worker, Any]] = SimpleQueue()
        self._ready: list[Outcome] = []
        self._workers: list[_Worker] = []
        self._loaders, self._form, self._ahead = loaders, form, ahead
        self._deaths = Deaths(form)
        self._lots: deque[tuple[int, list[Record]]] = deque()
        self._digest: str | None = None
        try:
            for number in range(len(loaders)):
                self._workers.append(self._begin(number))
        except BaseException:
            self.close()
            raise

    def wait(self, tick: Callable[[], bool]) -> str | None:
        """Waits until all have loaded; returns a digest of their weights, None if `tick` said to stop.

        Args:
            tick: called now and then; True ends the waiting.

        Raises:
            WorkerLost: a process ended; and whatever a loader raised.
        """
        while not all(worker.most for worker in self._workers):
            if tick():
                return None
            self._hear(TICK)
        return self._digest

    def __len__(self) -> int:
        waiting = sum(len(records) for _, records in self._lots)
        return sum(worker.open for worker in self._workers) + waiting + len(self._ready)

    @property
    def held(self) -> int:
        """See `Answerer.held`."""
        return sum(worker.held for worker in self._workers) + len(self._deaths.held)

    @property
    def full(self) -> bool:
        """Whether all of them have enough to do."""
        return all(worker.full for worker in self._workers)

    def submit(self, request: Request) -> None:
        """Gives a request to whoever has the least to do."""
        free = [worker for worker in self._workers if not worker.full]
        worker = min(free, key=lambda one: one.open / one.most)
        worker.give(Record(request.line, request.data))

    def next(self, timeout: float | None = None) -> Outcome | None:
        """See `Answerer.next`.

        Raises:
            WorkerLost: a process ended while it loaded, or processes die of all that they get; and whatever an
                engine raised.
        """
        if not self._ready:
            self._hear(timeout)
        return self._ready.pop() if self._ready else None

    def rest(self) -> list[Outcome]:
        """See `Answerer.rest`."""
        for worker in self._workers:
            if worker.held:
                worker.say(None)
        while any(worker.held for worker in self._workers):
            self._hear(None)
        if any(worker.given for worker in self._workers) or self._lots:
            return []  # one of them has died of it
        rest, self._ready = self._ready + self._deaths.answered(), []
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

    def _begin(self, number: int) -> _Worker:
        return _Worker(number, self._loaders[number], self._form, self._ahead, self._news)

    def _hear(self, timeout: float | None) -> None:
        """Takes one message of a worker, and gives it more to do if that is all it had."""
        try:
            worker, message = self._news.get(timeout=timeout)
        except Empty:
            return
        if message is None:
            self._bury(worker)
            return
        if isinstance(message, BaseException):
            raise message
        if not worker.most:
            self._loaded(worker, *message)
        else:
            worker.held, outcomes = message
            for outcome in outcomes:
                worker.given.pop(outcome.line)
            self._ready += outcomes
            if any(outcome.ok for outcome in outcomes):
                self._ready += self._deaths.answered()
        if not worker.open and worker.tries and worker.held:
            worker.say(None)  # or it would be blamed for what comes next
        elif not worker.open:
            worker.tries, records = self._lots.popleft() if self._lots and not worker.held else (0, [])
            for record in records:
                worker.give(record)

    def _loaded(self, worker: _Worker, most: int, digest: str, said: list[str]) -> None:
        worker.most = most
        if self._digest is None:
            self._digest = digest
            for text in said:
                warnings.warn(text, stacklevel=2)
        elif self._digest != digest:
            raise ConfigError("model: its weights were changed while the run had it")

    def _bury(self, worker: _Worker) -> None:
        """Puts another process in the place of one that has died."""
        who, how = f"worker {worker.number + 1} of {len(self._workers)}", worker.ended()
        worker.connection.close()
        if not worker.most:
            raise WorkerLost(f"{who} {how} while it loaded; was the memory full?")
        self._lots += self._deaths.lots(worker.tries, list(worker.given.values()), f"the worker {how}")
        warnings.warn(f"{who} {how}; another one begins in its place", stacklevel=2)
        self._workers[worker.number] = self._begin(worker.number)


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
