"""A batch run from its first line to its last."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .answer import Answerer, refused, try_defaults
from .cluster import Cluster, Crew
from .detect import detect
from .form import Form, Refusal, Request, duplicate
from .ledger import Ledger
from .progress import Meter, Report
from .sets import Keys
from .settings import BatchSettings, Summary
from .source import Record, Source
from .weights import weights
from .workers import Loader, Pool

if TYPE_CHECKING:
    from ..api import Model

WORTH = 32  # requests for which it is worth while to start another process
TICK = 0.2  # seconds at most between two looks at the disk's and the caller's wishes
STARVED = 0.02  # the same while there are too few requests
FEED = 64  # requests that are read and checked ahead of being put in line


def run(
    settings: BatchSettings,
    model: Model | Callable[[], Model | Sequence[Loader] | Cluster],
    report: Report = lambda progress: None,
    *,
    stop: threading.Event | None = None,
) -> Summary:
    """Answers every line of the input exactly once; goes on where an earlier start with these files ended.

    All lines are checked first, the bad ones written to the errors file, and only then is the model loaded; of a
    stream, which can be read only once, each line is checked as it comes. Answers are written as they are done. When
    it returns, every line is in one of the two files, unless it was told to stop. Whatever ends it otherwise, an
    exception in `report` included, leaves files that the same call goes on with.

    Args:
        model: or what loads it; that is not called where no line is left to answer, and the model is closed at the end.
            It may also give several loaders that can be pickled: each is then called in a process of its own, and all
            of them answer; or a `Cluster`, whose workers do.
        report: is told how far it is, a few times a second, from the calling thread.
        stop: set it from anywhere to end the run early.

    Raises:
        ConfigError: the settings do not suit the input, or the files belong to another run or process.
        OSError: the disk is full, for example.
        BrokenPipeError: nobody reads stdout any more.
    """
    source = Source(settings.source)
    form = detect(settings, source)
    stop = stop or threading.Event()
    with Ledger(settings, source, form) as ledger:
        meter = Meter(ledger, report)
        whole = ledger.finished
        if not whole:
            whole = _finish(settings, source, ledger, meter, model, stop)
        elif source.once:
            ledger.check_stream()
        return meter.summary(stopped=not whole)


def _finish(
    settings: BatchSettings,
    source: Source,
    ledger: Ledger,
    meter: Meter,
    model: Model | Callable[[], Model | Sequence[Loader] | Cluster],
    stop: threading.Event,
) -> bool:
    """Everything that is left to do; whether it came to its end."""
    if not source.once:
        if ledger.checked is None and not _check(settings, source, ledger, meter, stop):
            return False
        meter.total = ledger.checked
    if meter.left != 0:
        feed = Feed(_missing(settings, source, ledger, meter))
        try:
            first = _first(feed, ledger, meter, stop)
            if first is not None and not _load_and_answer(first, feed, settings, ledger, meter, model, stop):
                return False
        finally:
            feed.close()
        if stop.is_set() and not feed.ended:
            return False
        if not source.once and ledger.changed():
            raise ConfigError(f"{source.name}: was changed while it was read; --restart begins anew")
    meter.stage("writing")
    ledger.finish(meter.total)
    return True


def _check(settings: BatchSettings, source: Source, ledger: Ledger, meter: Meter, stop: threading.Event) -> bool:
    """Reads all lines once and writes down those that cannot be answered; whether it came to the end."""
    meter.stage("checking")
    names = _columns(source, ledger.form)
    for item in _checked(ledger.form, source.records(names, settings.shard), Keys()):
        meter.lines += 1
        if isinstance(item, Refusal):
            ledger.put(refused(ledger.form, item))
        if not meter.lines % 256:
            meter.tell()
            ledger.check()
            if stop.is_set():
                return False
    ledger.checked_all(meter.lines)
    return True


def _checked(form: Form, records: Iterator[Record], keys: Keys) -> Iterator[Request | Refusal]:
    """Each record as a request, or why it is none."""
    for record in records:
        item: Request | Refusal
        try:
            item = form.read(record)
        except Refusal as refusal:
            item = refusal
        if item.custom_id is not None and not keys.add(item.custom_id):
            item = duplicate(record.line, item.custom_id)
        yield item


def _first(feed: Feed, ledger: Ledger, meter: Meter, stop: threading.Event) -> Request | None:
    """The first request, for which a model is needed; None if there is none."""
    while not feed.ended and not stop.is_set():
        item = feed.get(TICK)
        if isinstance(item, Request):
            return item
        if item is not None:
            ledger.put(refused(ledger.form, item))
        meter.tell()
        ledger.check()
    return None


def _load_and_answer(
    first: Request,
    feed: Feed,
    settings: BatchSettings,
    ledger: Ledger,
    meter: Meter,
    model: Model | Callable[[], Model | Sequence[Loader] | Cluster],
    stop: threading.Event,
) -> bool:
    """Answers what is left; whether it came to the end."""
    meter.stage("loading")
    loaded = model() if callable(model) else model
    if isinstance(loaded, Cluster):
        crew = loaded.start(ledger.form, settings.ahead, meter.left)
        return _answer_by_many(crew, first, feed, ledger, meter, stop)
    if isinstance(loaded, Sequence):
        # More processes than there are batches to fill would only take their time to start.
        wanted = len(loaded) if meter.left is None else min(len(loaded), max(1, meter.left // WORTH))
        if wanted > 1:
            pool = Pool(loaded[:wanted], ledger.form, settings.ahead)
            return _answer_by_many(pool, first, feed, ledger, meter, stop)
        model = loaded = loaded[0]()
        own = True
    else:
        own = callable(model)
    try:
        ledger.check_model(weights(loaded.directory))
        try_defaults(loaded, ledger.form)
        answerer = Answerer(loaded, ledger.form, settings.ahead)
        try:
            loaded.start()
            return _answer(answerer, first, feed, ledger, meter, stop)
        finally:
            answerer.close()
    finally:
        if own:
            loaded.close()


def _answer_by_many(
    pool: Pool | Crew, first: Request, feed: Feed, ledger: Ledger, meter: Meter, stop: threading.Event
) -> bool:
    """The same in processes of their own."""

    def tick() -> bool:
        meter.tell()
        ledger.check()
        return stop.is_set()

    try:
        digest = pool.wait(tick)
        if digest is None:
            return False
        ledger.check_model(digest)
        return _answer(pool, first, feed, ledger, meter, stop)
    finally:
        pool.close()


def _answer(
    answerer: Answerer | Pool | Crew, first: Request, feed: Feed, ledger: Ledger, meter: Meter, stop: threading.Event
) -> bool:
    """Keeps the engine's line full and writes down what comes out; whether it came to the end."""
    answerer.submit(first)
    meter.stage("running")
    while not stop.is_set():
        for _ in range(FEED):
            if answerer.full or (item := feed.get(0 if len(answerer) else TICK)) is None:
                break
            if isinstance(item, Refusal):
                ledger.put(refused(ledger.form, item))
            else:
                answerer.submit(item)
        if len(answerer):
            outcome = answerer.next(TICK if answerer.full or feed.ended else STARVED)
            outcomes = [] if outcome is None else [outcome]
        else:
            outcomes = answerer.rest() if feed.ended else []
        for outcome in outcomes:
            meter.count(outcome)
            ledger.put(outcome)
        meter.tell()
        ledger.check()
        if feed.ended and not len(answerer) and not answerer.held:
            return True
    return False


def _missing(settings: BatchSettings, source: Source, ledger: Ledger, meter: Meter) -> Iterator[Request | Refusal]:
    """What is not accounted for, read and checked (of a stream for the first time)."""
    form = ledger.form
    if source.once:
        for item in _checked(form, source.records(None, settings.shard), Keys()):
            meter.lines += 1
            if not ledger.has(item):
                yield item
        meter.total = meter.lines
        return
    for record in source.records(None if form.keep else _columns(source, form), settings.shard):
        if record.line not in ledger.lines:
            try:
                yield form.read(record)
            except Refusal as refusal:
                yield refusal


def _columns(source: Source, form: Form) -> list[str] | None:
    """The columns of a table that requests are made of."""
    names = source.columns()
    return None if names is None else [name for name in names if name in (*form.input_columns, "custom_id")]


class Feed:
    """Reads and checks requests in a thread of its own, a few ahead.

    Fields:
        ended: whether all have been taken.
    """

    def __init__(self, items: Iterator[Request | Refusal]):
        self.ended = False
        self._queue: queue.Queue[Request | Refusal | BaseException | None] = queue.Queue(FEED)
        self._closed = threading.Event()
        # A daemon: nobody can wake a thread that waits for the next line of stdin.
        threading.Thread(target=self._run, args=(items,), name="dgemma-feed", daemon=True).start()

    def get(self, timeout: float) -> Request | Refusal | None:
        """The next one; None if there is none now, or no more.

        Raises:
            Exception: what came of reading on.
        """
        if self.ended:
            return None
        try:
            item = self._queue.get(timeout=timeout) if timeout else self._queue.get_nowait()
        except queue.Empty:
            return None
        self.ended = item is None
        if isinstance(item, BaseException) and not isinstance(item, Refusal):
            raise item
        return item

    def close(self) -> None:
        """No more are wanted."""
        self._closed.set()

    def _run(self, items: Iterator[Request | Refusal]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Request | Refusal | BaseException | None) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.5)
                return True
        return False
