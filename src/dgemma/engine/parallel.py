"""One engine in several processes that hold a network together (`model/ranks.py`).

Every rank has the same engine and takes the same steps: what a step does follows from the requests, and from nothing
that ranks have apart. So the first one, which people talk to, tells the others before each step what has come in since
the last; the rest they find out by themselves. A step that fails on one rank, or a rank that ends, ends all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ..checkpoint.load import load_network
from ..config import ModelConfig
from ..errors import ConfigError, DGemmaError
from ..model import Network
from ..model.ranks import Ranks
from ..params import GenerationConfig
from ..text import Tokenizer
from .engine import Engine
from .row import Request, Row
from .settings import EngineSettings
from .ticket import Ticket

log = logging.getLogger(__name__)
END = "end"
TICK, PATIENCE = 0.1, 10.0  # seconds: between two looks at who is there; that a rank gets to end
FOREVER = timedelta(days=3650)  # a rank that waits for the next request is not lost


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank needs to know to begin.

    Fields:
        device, dtype, threads: as in `dgemma.load`.
        port: of the first rank's store, on this machine.
    """

    rank: int
    size: int
    port: int
    directory: Path
    config: ModelConfig
    generation: GenerationConfig
    device: str
    dtype: torch.dtype
    threads: int

    def load(self) -> Network:
        """This rank's part of the network."""
        ranks = Ranks(rank=self.rank, size=self.size, config=self.config)
        network = load_network(self.directory, self.config, device=self.device, dtype=self.dtype, ranks=ranks)
        network.generation = self.generation
        return network.eval().requires_grad_(False)


class Team:
    """The ranks of one network: this process, and others of this machine.

    Args:
        devices: one a rank, this one's first.

    Raises:
        ConfigError: the network's sizes cannot be divided so, or this process has such a network already.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        generation: GenerationConfig,
        devices: Sequence[str],
        dtype: torch.dtype,
    ):
        size = len(devices)
        Ranks(rank=0, size=size, config=config)
        if dist.is_initialized():
            raise ConfigError("tensor_parallel: this process is part of a process group already; one model a process")
        self._store = store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        threads = max(1, torch.get_num_threads() // size)
        self._places = [
            Place(
                rank=rank, size=size, port=store.port, directory=directory, config=config, generation=generation,
                device=device, dtype=dtype, threads=threads,
            )
            for rank, device in enumerate(devices)
        ]  # fmt: skip
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the GPU's state
        self._processes = [
            context.Process(target=_follow, args=(place,), name=f"dgemma-rank-{place.rank}", daemon=True)
            for place in self._places[1:]
        ]

    def load(self) -> Network:
        """Starts the others, and loads this process's part while they load theirs.

        Raises:
            DGemmaError: a rank could not begin; what it says.
        """
        atexit.register(self.close, 0.0)
        torch.set_num_threads(self._places[0].threads)  # more would take the others' cores while they wait
        try:
            for process in self._processes:
                process.start()
            network = self._places[0].load()
            self._await("loaded")
            _join(self._store, self._places[0])
        except BaseException:
            self.close()
            raise
        return network

    def engine(self, network: Network, tokenizer: Tokenizer | None, settings: EngineSettings | None = None) -> Engine:
        """The engine of all of them; one, once."""
        return Leader(self, network, tokenizer, settings)

    def lost(self, seconds: float = 0.0) -> str | None:
        """Who has ended, and how; None if all are there after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            for number, process in enumerate(self._processes, start=1):
                if process.exitcode is not None:
                    code = process.exitcode
                    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                    return f"rank {number} of {len(self._processes) + 1} ended {how}; was its memory full?"
            if time.monotonic() >= end:
                return None
            time.sleep(TICK)

    def close(self, patience: float = PATIENCE) -> None:
        """Ends them, those that were told to end after so many seconds."""
        atexit.unregister(self.close)
        for process in self._processes:
            if process.pid is not None:
                process.join(patience if dist.is_initialized() else 0.0)
                process.kill()
                process.join()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _await(self, word: str) -> None:
        """Waits until every other rank has said a word; what one says instead is raised here."""
        store = self._store
        for number in range(1, len(self._processes) + 1):
            while not store.check([f"{word}/{number}"]):
                if store.check([f"failed/{number}"]):
                    raise DGemmaError(f"tensor_parallel: rank {number}: {store.get(f'failed/{number}').decode()}")
                lost = self.lost()
                if lost is not None:
                    raise DGemmaError(f"tensor_parallel: {lost}")
                time.sleep(TICK)


class Leader(Engine):
    """The first rank's engine."""

    def __init__(
        self, team: Team, network: Network, tokenizer: Tokenizer | None, settings: EngineSettings | None = None
    ):
        self._team, self._count = team, 0
        self._told: dict[int, int] = {}  # tickets by id: the number that they are known by
        super().__init__(network, tokenizer, settings)
        _tell((self.settings, (self.pages.full.size, self.pages.sliding.size)))

    def step(self) -> bool:
        """See `Engine.step`; nothing is tried again."""
        with self._queue:
            if not (self._news or self._waiting or self._running):
                return False
        return super().step()

    def close(self) -> None:
        """Ends every request, the thread and the other ranks."""
        if not self._closed:
            super().close()
            with contextlib.suppress(Exception):  # a rank that is lost
                _tell(END)
        self._team.close()

    def _try_step(self) -> None:
        try:
            self.step()
        except Exception as error:
            why = self._team.lost(TICK * 10) or f"{type(error).__name__}: {error}"
            log.exception("a step failed, and the ranks with it: %s", why)
            with self._lock, self._queue:
                self._closed = True
                rows = [*self._running, *self._waiting, *(one for one in self._news if isinstance(one, Row))]
                self._running.clear()
                self._waiting.clear()
                self._news.clear()
                for row in rows:
                    row.ticket.fail(DGemmaError(f"tensor_parallel: {why}; load the model again"))
                self._queue.notify_all()

    def _heard(self, news: list[Row | Ticket]) -> list[Row | Ticket]:
        """Tells the others: requests, and the numbers of those that are cancelled."""
        words: list[Request | int] = []
        for one in news:
            if isinstance(one, Row):
                self._told[id(one.ticket)] = self._count
                self._count += 1
                words.append(one.request)
            elif id(one) in self._told:
                words.append(self._told[id(one)])
        _tell(words)
        return news

    def _leave(self, row: Row) -> None:
        super()._leave(row)
        self._told.pop(id(row.ticket), None)


class Follower(Engine):
    """Another rank's engine, which takes the steps that the first one takes."""

    def __init__(self, network: Network, tokenizer: Tokenizer | None):
        settings, room = _listen()
        self._count = 0
        self._others: dict[int, Ticket] = {}
        super().__init__(network, tokenizer, settings, room=room)

    def follow(self) -> None:
        """Steps until the first rank ends."""
        while not self._closed:
            self.step()

    def _heard(self, news: list[Row | Ticket]) -> list[Row | Ticket]:
        words = _listen()
        if words == END:
            self._closed = True
            return []
        news = []
        for word in words:
            if isinstance(word, int):
                if word in self._others:
                    news.append(self._others[word])
                continue
            ticket = _unread(word)
            self._others[self._count] = ticket
            self._count += 1
            news.append(Row(word, ticket, self.tokenizer, self.network.config.vocab_size))
        return news

    def _leave(self, row: Row) -> None:
        super()._leave(row)
        self._others = {number: ticket for number, ticket in self._others.items() if ticket is not row.ticket}


def _follow(place: Place) -> None:
    """The life of another rank; it ends with the first one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first one gets them too, and ends it
    torch.set_num_threads(place.threads)
    store = dist.TCPStore("127.0.0.1", place.port, place.size, is_master=False)
    try:
        network = place.load()
        tokenizer = Tokenizer.read(place.directory)
    except Exception as error:
        store.set(f"failed/{place.rank}", str(error))
        os._exit(1)
    store.set(f"loaded/{place.rank}", "")
    _join(store, place)
    try:
        Follower(network, tokenizer).follow()
    except Exception as error:
        if "losed by peer" not in str(error) and "reset by peer" not in str(error):  # else another one has ended first
            log.error("rank %d: %s: %s", place.rank, type(error).__name__, error)
        os._exit(1)  # at once: the others wait


def _join(store: Any, place: Place) -> None:
    """Words between processes go over gloo; tensors over it too, or over NCCL where they are on GPUs."""
    backend = "cpu:gloo,cuda:nccl" if place.device.startswith("cuda") else "gloo"
    if place.device.startswith("cuda"):
        torch.cuda.set_device(place.device)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=FOREVER)


def _unread(request: Request) -> Ticket:
    """A ticket that nobody reads."""

    def nothing(*_: Any) -> bool:
        return False

    return Ticket(
        prompt_tokens=len(request.prompt), seed=request.seed, drive=nothing, ensure_thread=nothing, cancel=nothing  # type: ignore[arg-type]
    )  # fmt: skip


def _tell(words: Any) -> None:
    dist.broadcast_object_list([words], src=0, device=torch.device("cpu"))


def _listen() -> Any:
    words: list[Any] = [None]
    dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
    return words[0]
