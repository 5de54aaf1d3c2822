"""Workers on a Ray cluster, one a GPU or a node, through Ray Data, which starts, feeds and replaces them.

Requests are read, and answers written, here: the cluster is given blocks of requests that are missing, a few ahead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from ..errors import ConfigError, DGemmaError, WorkerLost
from .answer import Outcome
from .deaths import Deaths
from .form import Form, Request
from .joining import AUTO, LOCAL, REACH, connect, last_line, reach
from .source import Record

if TYPE_CHECKING:
    from ..api import Model
    from .blocks import Reply

LEAST = 32  # requests of a block, where there are so many
BYTES = 8 << 20  # of a block
LINGER = 0.5  # seconds that a block waits to be filled
TICK = 0.2  # seconds between two looks at the caller's wishes
SLOW = 60.0  # seconds without a worker, after which it is said what they wait for
LOOK = 10.0  # seconds between two looks for workers that say nothing
LOST = 60.0  # seconds without a sign of a worker, after which others get what it had
GONE = 600.0  # seconds without a sign of any, after which the run ends


class ClusterLost(WorkerLost):
    """The cluster, or what this run had on it, has ended."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster, and what is wanted of it.

    Fields:
        address: "local" starts one on this machine; "auto" is the one that this machine belongs to; or `host:port`.
        load: takes `device` and `threads`, and gives a model; it is pickled, and called by each worker.
        workers: None for one a GPU; where there are no GPUs, one a node.
        device: "cuda", "cpu", or "auto" for GPUs if the cluster has any.
        threads: CPUs of each worker; None for one beside a GPU, otherwise as many as there are for it.
        batch: requests that run at once in each.

    Raises:
        ConfigError: Ray is missing, a field is out of range, or nobody answers at the address.
    """

    address: str
    load: Callable[..., Model]
    workers: int | None = None
    device: str = AUTO
    threads: int | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
            raise ConfigError("ray: is not installed; pip install 'dgemma[ray]'")
        if self.device not in (AUTO, "cpu", "cuda"):
            raise ConfigError(f"device: {self.device!r} is not auto, cpu or cuda; Ray chooses which GPU a worker gets")
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is not a number of at least 1")
        if self.address not in (LOCAL, AUTO):
            reach(self.address)

    def start(self, form: Form, ahead: int | None = None, left: int | None = None) -> Crew:
        """Workers for so many requests (None: nobody knows).

        Raises:
            ConfigError: there is no such cluster.
        """
        return Crew(self, form, ahead, left)


class Crew:
    """What `Pool` is, by workers on a cluster."""

    def __init__(self, cluster: Cluster, form: Form, ahead: int | None, left: int | None):
        self._own = connect(cluster.address)
        from . import blocks

        self._closed = False
        self._news: SimpleQueue[Reply | BaseException | None] = SimpleQueue()
        self._ready: list[Outcome] = []
        self._block: list[Record] = []
        self._bytes, self._since = 0, 0.0
        self._digest: str | None = None
        self._wants = count, cpus, gpus = share(_nodes(), cluster)
        if left is not None:  # more workers than there are batches to fill would only take their time to start
            count = min(count, max(1, left // LEAST))
        size = max(LEAST, cluster.batch) if ahead is None else max(1, ahead // blocks.AT_ONCE)
        self._size = size if left is None else max(1, min(size, math.ceil(left / count)))
        self._most = count * self._size * (blocks.AT_ONCE + blocks.SPARE) if ahead is None else count * ahead
        self._given: dict[int, int] = {}  # requests of each block that is not answered
        self._deaths = Deaths(form)
        self._looked = time.monotonic()
        self._next = self._open = 0
        device = "cuda" if gpus else "cpu"
        load = partial(cluster.load, device=device, threads=cluster.threads if gpus else cpus)
        self._shelf = blocks.shelf()
        answers = partial(blocks.replies, self._shelf, load, form, ahead, count, cpus, gpus)
        self._thread = threading.Thread(target=self._listen, args=(answers,), name="dgemma-cluster", daemon=True)
        self._thread.start()

    def wait(self, tick: Callable[[], bool]) -> str | None:
        """Waits until one worker has loaded; see `Pool.wait`.

        Raises:
            ConfigError, CheckpointError: it cannot; the message ends with the node.
            ClusterLost: the cluster has ended.
        """
        self._give([])
        begun: float | None = time.monotonic()
        while self._digest is None:
            if tick():
                return None
            self._hear(TICK)
            if begun is not None and time.monotonic() - begun > SLOW:
                begun = None
                count, cpus, gpus = self._wants
                what = f"{gpus} GPU and {cpus} CPUs" if gpus else f"{cpus} CPUs"
                warnings.warn(
                    f"no worker has begun for {SLOW:.0f} s: each of {count} waits for {what} of the cluster, or loads "
                    "a large model",
                    stacklevel=2,
                )
        return self._digest

    def __len__(self) -> int:
        return self._open + len(self._block) + len(self._ready)

    @property
    def held(self) -> int:
        """See `Answerer.held`."""
        return len(self._deaths.held)

    @property
    def full(self) -> bool:
        """Whether all of them have enough to do."""
        return self._open + len(self._block) >= self._most

    def submit(self, request: Request) -> None:
        """Takes a request, to be given with others."""
        if not self._block:
            self._since = time.monotonic()
        self._block.append(Record(request.line, request.data))
        self._bytes += len(request.data) if isinstance(request.data, bytes) else 0
        if len(self._block) >= self._size or self._bytes >= BYTES:
            self._flush()

    def next(self, timeout: float | None = None) -> Outcome | None:
        """See `Answerer.next`.

        Raises:
            ConfigError: a worker has another model than the others.
            WorkerLost: the cluster has ended, no worker is left, or they die of all that they get.
            Exception: a worker's engine has failed.
        """
        if self._block and time.monotonic() - self._since > LINGER:
            self._flush()
        if not self._ready:
            self._look()
            self._hear(timeout)
        return self._ready.pop() if self._ready else None

    def rest(self) -> list[Outcome]:
        """See `Answerer.rest`."""
        rest, self._ready = self._ready + self._deaths.answered(), []
        return rest

    def close(self) -> None:
        """Ends the workers; what is under way is lost. A connection to Ray that was there before stays."""
        self._closed = True
        import ray

        with contextlib.suppress(Exception):
            ray.get(self._shelf.end.remote(), timeout=REACH)
        if not self._open:
            self._thread.join(REACH)
        if self._own:
            ray.shutdown()

    def _flush(self) -> None:
        block, self._block, self._bytes = self._block, [], 0
        self._give(block)

    def _give(self, records: list[Record], tries: int = 0) -> None:
        self._given[self._next] = len(records)
        self._next += 1
        self._open += len(records)
        self._shelf.put.remote(pickle.dumps((tries, records)))

    def _take(self, number: int) -> bool:
        """Whether a block was still missing, which it is not any more."""
        self._shelf.drop.remote(number)
        count = self._given.pop(number, None)
        self._open -= count or 0
        return count is not None

    def _look(self) -> None:
        """Gives others what silent workers have, which Ray keeps for them as long as it hopes for their return."""
        import ray

        from . import blocks

        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        try:
            silence, lost = ray.get(self._shelf.missing.remote(LOST), timeout=REACH)
        except ray.exceptions.GetTimeoutError:
            return  # this machine is busy
        except Exception as error:
            raise _in_a_line(error) from error
        if silence > GONE:
            gone = sorted({node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]})
            where = f" (nodes that have gone: {', '.join(gone)})" if gone else ""
            raise ClusterLost(
                f"no worker was heard of for {silence:.0f} s{where}, {self._open:,} requests are unanswered; the same "
                "command goes on when the cluster has room for workers again"
            )
        if silence > LOST:
            return  # nobody is there to take them
        for number, begun, block in lost:
            tries, records = blocks.read_block(block)
            if self._take(number) and records:
                self._again(tries, records, died=begun)

    def _again(self, tries: int, records: list[Record], *, died: bool = True) -> None:
        for cost, lot in self._deaths.lots(tries, records, "the worker died") if died else [(tries, records)]:
            self._give(lot, cost)

    def _hear(self, timeout: float | None) -> None:
        try:
            reply = self._news.get(timeout=timeout)
        except Empty:
            return
        if reply is None:
            raise ClusterLost(f"the cluster has ended with {self._open:,} requests unanswered")
        if isinstance(reply, BaseException):
            raise _in_a_line(reply) from reply
        if reply.error is not None:
            raise _on(reply.node, reply.error)
        if self._digest is None:
            self._digest = reply.digest
            for text in reply.said:
                warnings.warn(text, stacklevel=2)
        elif self._digest != reply.digest:
            raise ConfigError(f"model: its weights on node {reply.node} are not those of the other nodes")
        if not self._take(reply.number):
            return  # others have its requests
        self._ready += reply.outcomes
        if any(outcome.ok for outcome in reply.outcomes):
            self._ready += self._deaths.answered()
        if reply.again is not None:
            self._again(*reply.again)

    def _listen(self, answers: Callable[[], Iterator[Reply]]) -> None:
        try:
            for reply in answers():
                self._news.put(reply)
                if self._closed:
                    return
            self._news.put(None)
        except BaseException as error:
            self._news.put(error)


def share(nodes: list[dict[str, float]], cluster: Cluster) -> tuple[int, int, int]:
    """How many workers, and the CPUs and GPUs of each.

    Args:
        nodes: what each has.
    """
    found = sum(int(node.get("GPU", 0)) for node in nodes)
    if cluster.device == "cuda" or (cluster.device == AUTO and found):
        return cluster.workers or max(1, found), cluster.threads or 1, 1
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    count = cluster.workers or max(1, len(cpus))
    fits = [each for each in range(1, max(cpus, default=1) + 1) if sum(have // each for have in cpus) >= count]
    return count, cluster.threads or max(fits, default=1), 0


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _on(node: str, error: Exception) -> Exception:
    """A worker's error, with the node in its message."""
    if isinstance(error, DGemmaError):
        return type(error)(f"{error} (on node {node})")
    return RuntimeError(f"{type(error).__name__}: {error} (on node {node})")


def _in_a_line(error: BaseException) -> Exception:
    """What Ray raised, without its pages of explanation."""
    return ClusterLost(f"the cluster failed ({type(error).__name__}: {last_line(error)})")
