"""A batch run from its first line to its last."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .answer import Answerer, refused
from .detect import detect
from .form import Form, Refusal, Request, duplicate
from .ledger import Ledger
from .progress import Meter, Report
from .sets import Keys
from .settings import BatchSettings, Summary
from .source import Record, Source

if TYPE_CHECKING:
    from ..api import Model

TICK = 0.2  # seconds at most between two looks at the disk's and the caller's wishes
STARVED = 0.02  # the same while there are too few requests
FEED = 64  # requests that are read and checked ahead of being put in line
SAMPLES, SAMPLE = 32, 1 << 16  # pieces of a weights file, and their bytes, that tell it from another


def run(
    settings: BatchSettings,
    model: Model | Callable[[], Model],
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
        return meter.summary(stopped=not whole)


def _finish(
    settings: BatchSettings,
    source: Source,
    ledger: Ledger,
    meter: Meter,
    model: Model | Callable[[], Model],
    stop: threading.Event,
) -> bool:
    """Everything that is left to do; whether it came to its end."""
    if not source.once:
        if ledger.checked is None and not _check(settings, source, ledger, meter, stop):
            return False
        meter.total = ledger.checked
    if meter.left != 0:
        meter.stage("loading")
        loaded = model() if callable(model) else model
        try:
            ledger.check_model(weights(loaded.directory))
            if not _answer(settings, source, ledger, meter, loaded, stop):
                return False
        finally:
            if callable(model):
                loaded.close()
        if not source.once and ledger.changed():
            raise ConfigError(f"{source.name}: was changed while it was read; --restart begins anew")
    meter.stage("writing")
    ledger.finish()
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


def _answer(
    settings: BatchSettings, source: Source, ledger: Ledger, meter: Meter, model: Model, stop: threading.Event
) -> bool:
    """Answers what is left; whether it came to the end."""
    answerer = Answerer(model, ledger.form, settings.ahead)
    model.start()
    feed = Feed(_missing(settings, source, ledger, meter))
    meter.stage("running")
    try:
        while not stop.is_set():
            while not answerer.full and (item := feed.get(0 if len(answerer) else TICK)) is not None:
                if isinstance(item, Refusal):
                    ledger.put(refused(ledger.form, item))
                else:
                    answerer.submit(item)
            outcome = answerer.next(TICK if answerer.full or feed.ended else STARVED) if len(answerer) else None
            for one in [outcome] if outcome else answerer.rest() if feed.ended and not len(answerer) else []:
                meter.count(one)
                ledger.put(one)
            meter.tell()
            ledger.check()
            if feed.ended and not len(answerer):
                return True
        return False
    finally:
        feed.close()
        answerer.close()


def _missing(settings: BatchSettings, source: Source, ledger: Ledger, meter: Meter) -> Iterator[Request | Refusal]:
    """What is not accounted for, read and checked (of a stream for the first time)."""
    form = ledger.form
    if source.once:
        for item in _checked(form, source.records(None, settings.shard), Keys()):
            meter.lines += 1
            if item.line in ledger.lines:
                ledger.same(item.line, item.custom_id)
            else:
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


def weights(directory: Path) -> str:
    """A digest of a model's directory that tells it from another: its settings, and samples of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.jinja"), *directory.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in sorted({number * max(0, size - SAMPLE) // (SAMPLES - 1) for number in range(SAMPLES)}):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
