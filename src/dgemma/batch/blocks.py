"""What runs on a Ray cluster: blocks of requests to wherever they are answered, and what answers them.

Needs Ray: whoever imports this has looked whether it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .answer import Answerer, Outcome, try_defaults
from .form import Form
from .source import Record
from .weights import weights
from .workers import portable

if TYPE_CHECKING:
    from ..api import Model

AT_ONCE, SPARE = 4, 2  # blocks that a worker answers at once, and that wait beside it
BEAT = 5.0  # seconds between two signs of life of a worker
Block = tuple[int, list[Record]]  # how many workers the records have cost so far, and the records


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a worker says of one block.

    Fields:
        number: the block's.
        node: where the worker is; digest: of its model's weights; said: warnings while it loaded.
        outcomes: of the block's requests; error: why there are none.
        again: the block, where a worker that began it has died: it is to be cut (see `Deaths`).
    """

    number: int
    node: str
    digest: str = ""
    said: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    error: Exception | None = None
    again: Block | None = None


class Shelf:
    """Blocks that are not answered, on the node of whoever reads the input: an actor.

    A block is there until it is dropped, so that it can be asked for again. Workers say here that they live, and what
    they begin: Ray waits for a worker whose node has gone, however long that is.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, bytes] = {}
        self._begun: dict[int, str] = {}  # by which worker
        self._heard: dict[str, float] = {}  # when, of each worker
        self._idle: dict[str, float] = {}  # since when a worker has had no block
        self._next = 0
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, block: bytes) -> None:
        """One more block; they are numbered from 0."""
        async with self._changed:
            self._blocks[self._next] = block
            self._next += 1
            self._changed.notify_all()

    async def end(self) -> None:
        """No more will come."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def take(self, number: int) -> bytes | None:
        """The block of that number, once it is there; empty if it is answered, None if no more come."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < self._next or self._ended)
            return self._blocks.get(number, b"") if number < self._next else None

    async def drop(self, number: int) -> None:
        """A block is answered, or given again under other numbers."""
        await self.finish(number)
        self._blocks.pop(number, None)

    async def beat(self, worker: str) -> None:
        """It lives."""
        self._heard[worker] = now = time.monotonic()
        if worker not in self._begun.values():
            self._idle.setdefault(worker, now)

    async def begin(self, number: int, worker: str) -> bool | None:
        """A worker is to answer a block: whether one has begun it and died; None if nobody wants it any more."""
        await self.beat(worker)
        if number not in self._blocks:
            return None
        before, self._begun[number] = self._begun.get(number), worker
        self._idle.pop(worker, None)
        return before is not None

    async def finish(self, number: int) -> None:
        """A worker has done with a block: if it dies now, it wasn't by this one."""
        worker = self._begun.pop(number, None)
        if worker is not None and worker not in self._begun.values():
            self._idle[worker] = time.monotonic()

    async def missing(self, patience: float) -> tuple[float, list[tuple[int, bool, bytes]]]:
        """Seconds since any worker was heard of, and the blocks that will not come back by themselves.

        They are those of workers that have said nothing for `patience` seconds, and, where a worker that lives has had
        nothing to do for so long, those that nobody has begun. Of each: its number, whether it was begun, itself.
        """
        now = time.monotonic()
        silent = {worker for worker, heard in self._heard.items() if now - heard > patience}
        idle = any(now - since > patience for worker, since in self._idle.items() if worker not in silent)
        lost = [
            (number, number in self._begun, block)
            for number, block in self._blocks.items()
            if (self._begun[number] in silent if number in self._begun else idle)
        ]
        return now - max(self._heard.values(), default=now), lost


class Requests(Datasource):
    """The blocks of a shelf as Ray Data reads them: one task, which gives each as soon as it is there."""

    def __init__(self, shelf: Any):
        self._shelf = shelf

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Reader(self._shelf), unknown)]


class _Reader:
    """All blocks of a shelf, each a table of one row."""

    def __init__(self, shelf: Any):
        self._shelf = shelf

    def __call__(self) -> Iterator[pa.Table]:
        for number in itertools.count():
            block = ray.get(self._shelf.take.remote(number))
            if block is None:
                return
            yield pa.table({"number": pa.array([number], pa.int64()), "block": pa.array([block], pa.binary())})


class Worker:
    """An actor with a model, which answers blocks: several at once in threads, so that its batch stays full.

    What it cannot do it says in its replies: an exception in it would be one of Ray's own for whoever waits.
    """

    def __init__(self, shelf: Any, load: Callable[[], Model], form: Form, ahead: int | None):
        self._form, self._ahead, self._shelf = form, ahead, shelf
        self._node = ray.util.get_node_ip_address()
        self._name = uuid.uuid4().hex
        self._turns = Turns()
        threading.Thread(target=self._live, daemon=True).start()
        self._error: Exception | None = None
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self._model = load()
                try_defaults(self._model, form)
            self._said = tuple(str(one.message) for one in said)
            self._digest = weights(self._model.directory)
            self._model.start()
        except Exception as error:
            self._error = portable(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replies to one block, in one row: a retry then gives all of a block's answers again, or none."""
        (number,), (block,) = table["number"].to_pylist(), table["block"].to_pylist()
        reply = pickle.dumps(self._reply(number, block))
        return pa.table({"reply": pa.array([reply], pa.binary())})

    def _reply(self, number: int, block: bytes) -> Reply:
        if self._error is not None:
            return Reply(number=number, node=self._node, error=self._error)
        tries, records = read_block(block)
        with self._turns.one(alone=bool(tries)):
            begun = ray.get(self._shelf.begin.remote(number, self._name))
            if begun is None:
                return Reply(number=number, node=self._node, digest=self._digest, said=self._said)
            if begun and records:
                return Reply(number=number, node=self._node, digest=self._digest, again=(tries, records))
            answerer = Answerer(self._model, self._form, self._ahead)
            try:
                outcomes = tuple(answerer.answer(records))
            except Exception as error:
                return Reply(number=number, node=self._node, error=portable(error))
            finally:
                answerer.close()
                ray.get(self._shelf.finish.remote(number))  # before the next one can kill this process
        return Reply(number=number, node=self._node, digest=self._digest, said=self._said, outcomes=outcomes)

    def _live(self) -> None:
        while True:
            self._shelf.beat.remote(self._name)
            time.sleep(BEAT)


class Turns:
    """Many at once, or one by itself, which those that come after it wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._alone = 0

    @contextlib.contextmanager
    def one(self, *, alone: bool) -> Iterator[None]:
        """A turn."""
        with self._changed:
            if alone:
                self._changed.wait_for(lambda: not self._alone)
                self._alone = 1
                self._changed.wait_for(lambda: not self._running)
            else:
                self._changed.wait_for(lambda: not self._alone)
                self._running += 1
        try:
            yield
        finally:
            with self._changed:
                if alone:
                    self._alone = 0
                else:
                    self._running -= 1
                self._changed.notify_all()


def read_block(block: bytes) -> Block:
    """What was put on a shelf; nothing where it was answered meanwhile."""
    return pickle.loads(block) if block else (0, [])


def shelf() -> Any:
    """One, on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Shelf).options(scheduling_strategy=here).remote()


def replies(
    shelf: Any, load: Callable[[], Model], form: Form, ahead: int | None, count: int, cpus: int, gpus: int
) -> Iterable[Reply]:
    """Answers to a shelf's blocks by `count` workers, as they are done, until it has ended.

    Args:
        cpus, gpus: of each worker.

    Raises:
        Exception: one of Ray's.
    """
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a row each: blocks go on as they come
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    with ray.data.DataContext.current(context):
        requests = ray.data.read_datasource(Requests(shelf), override_num_blocks=1, num_cpus=0, label_selector=here)
        answers = requests.map_batches(
            Worker,
            fn_constructor_args=(shelf, load, form, ahead),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(
                size=count,
                max_concurrent_calls_per_actor=AT_ONCE,
                max_tasks_in_flight_per_actor=AT_ONCE + SPARE,
                enable_true_multi_threading=True,
            ),
        )
        for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for reply in table["reply"].to_pylist():
                yield pickle.loads(reply)
