"""What answers batches: one after another, in a thread of its own, beside the requests of those who wait."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch import BatchSettings, Progress, run
from ..batch.answer import refused
from ..batch.append import mend
from ..batch.detect import detect
from ..batch.form import Refusal
from ..batch.ledger import Ledger
from ..batch.source import Source
from ..errors import ConfigError, Draining
from ..params import SamplingParams
from ..protocol.batch_schema import BatchRequest
from ..protocol.errors import ApiError
from ..protocol.render import new_id
from .data import DataFolder
from .logs import logger

if TYPE_CHECKING:
    from ..api import Model

Json = dict[str, Any]
WINDOW_SECONDS = 24 * 3600  # OpenAI's only one
RETRY_SECONDS = 30.0  # after a failure that may pass, such as a full disk
SWEEP_SECONDS = 600.0  # between two looks for files whose time is over
SHARE = 0.75  # of the places in the engine's batch: the others are always there for those who wait
JOIN_SECONDS = 20.0  # what a batch gets to put its files down when the server ends
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


@dataclass
class Current:
    """The batch that is worked on.

    Fields:
        stop: ends the work early.
        counts: as its object shows them.
    """

    id: str
    stop: threading.Event = field(default_factory=threading.Event)
    counts: Json | None = None


class BatchRunner:
    """Answers a server's batches, the oldest first. What it has done is on the disk: after the server's end, however
    it came, the next one that has the data folder goes on.

    Args:
        data: where they are kept.
    """

    def __init__(self, data: DataFolder):
        self._data = data
        self._model: Model | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # who works on which
        self._current: Current | None = None
        self._news = threading.Event()
        self._closed = threading.Event()

    def start(self, model: Model) -> None:
        """Goes on with what an earlier server has left."""
        self._model = model
        if self._data.open_batches():
            self._begin()

    def create(self, form: BatchRequest) -> Json:
        """A new batch, whose input is there; returns its object."""
        now = int(time.time())
        after = form.output_expires_after
        batch: Json = {
            "id": new_id("batch_"),
            "object": "batch",
            "endpoint": form.endpoint,
            "model": self._model and self._model.name,
            "errors": None,
            "input_file_id": form.input_file_id,
            "completion_window": form.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_SECONDS,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "usage": None,
            "metadata": form.metadata,
        }
        self._data.add_batch(batch, after.seconds if after else None)
        self._begin()
        return batch

    def live(self, batch: Json) -> Json:
        """A batch's object with its counts of this moment."""
        current = self._current
        if current is None or current.id != batch["id"] or current.counts is None or batch["status"] not in RUNNING:
            return batch
        return {**batch, "request_counts": current.counts}

    def cancel(self, name: str) -> Json:
        """Ends a batch early: at once where it has not begun; else it is `cancelling` until its files are in place.

        Raises:
            ApiError: 404; 409 where it has ended.
        """
        with self._lock:
            batch = self._data.batch(name)
            if batch["status"] == "cancelling":
                return self.live(batch)
            if batch["status"] not in RUNNING:
                message = f"batch_id: a batch that is {batch['status']} cannot be cancelled"
                raise ApiError(409, message, param="batch_id", code="batch_has_ended")
            changes = {"status": "cancelling", "cancelling_at": int(time.time())}
            if self._current is not None and self._current.id == name:
                self._current.stop.set()
            elif batch["in_progress_at"] is None:
                return self._data.end(name, "cancelled", **changes)
            return self.live(self._data.update(name, **changes))

    def stop(self) -> None:
        """No more of them: the one that is worked on stops, and goes on at the next start."""
        with self._lock:
            self._closed.set()
            self._news.set()
            if self._current is not None:
                self._current.stop.set()

    def join(self) -> None:
        """Waits for that."""
        self.stop()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)

    def _begin(self) -> None:
        with self._lock:
            self._news.set()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._news.clear()
            try:
                self._data.sweep()
                with self._lock:
                    batch = next(iter(self._data.open_batches()), None)
                    self._current = None if batch is None else Current(batch["id"])
                if batch is None:
                    self._news.wait(SWEEP_SECONDS)
                    continue
                assert self._current is not None
                self._answer(batch, self._current)
            except Exception as error:
                if self._closed.is_set():
                    return
                with self._lock:
                    about, self._current = {"batch": self._current and self._current.id}, None
                logger.log(logging.ERROR, "a batch has to wait", exc_info=error, extra={"about": about})
                self._closed.wait(RETRY_SECONDS)

    def _answer(self, batch: Json, current: Current) -> None:
        """Works on a batch until it ends, or the server does."""
        changes: Json = {}
        ending = self._data.ending(batch["id"])
        if ending is None:
            settings = self._settings(batch)
            try:
                ending = self._outcome(settings, batch, current)
            except ConfigError as error:
                ending = "failed"
                one = {
                    "code": "invalid_batch",
                    "line": None,
                    "message": _plainly(error, settings, batch),
                    "param": None,
                }
                changes["errors"] = {"object": "list", "data": [one]}
            except Draining:
                if not self._closed.is_set():
                    raise
            if ending is None:
                return
            for path in (settings.target, settings.errors):
                assert isinstance(path, Path)
                mend(path, lambda line: True)  # after a crash the last line may be torn
            assert isinstance(settings.target, Path)
            changes["usage"] = _usage(settings.target)
        if current.counts is not None:
            changes["request_counts"] = current.counts
        with self._lock:
            self._data.end(batch["id"], ending, **changes)
            self._current = None

    def _outcome(self, settings: BatchSettings, batch: Json, current: Current) -> str | None:
        """The status that a batch comes to; None if it is to go on another time."""
        whole = False
        if batch["status"] != "cancelling" and time.time() < batch["expires_at"]:
            whole = self._run(settings, batch, current)
        if self._data.batch(batch["id"])["status"] == "cancelling":
            return "cancelled"
        if whole:
            return "completed"
        if time.time() < batch["expires_at"]:
            return None
        self._expire(settings, current)
        return "expired"

    def _settings(self, batch: Json) -> BatchSettings:
        assert self._model is not None
        place = self._data.workplace(batch["id"])
        # Two batches of one file differ, as two requests without a seed do; one that goes on stays the same.
        seed = int.from_bytes(hashlib.blake2b(batch["id"].encode(), digest_size=6).digest(), "big")
        return BatchSettings(
            source=self._data.content(batch["input_file_id"]),
            target=place / "output.jsonl",
            errors=place / "error.jsonl",
            format="openai",
            model=self._model.name,
            url=batch["endpoint"],
            params=SamplingParams(seed=seed),
            ahead=max(1, int(SHARE * self._model.engine.settings.max_batch)),
        )

    def _run(self, settings: BatchSettings, batch: Json, current: Current) -> bool:
        """Whether all of it is done."""
        told = {"running": "in_progress", "writing": "finalizing"}

        def report(progress: Progress) -> None:
            current.counts = _counts(progress.lines, progress.done, progress.failed)
            status = told.pop(progress.stage, None)
            if status is not None:
                with self._lock:
                    now = self._data.batch(batch["id"])
                    if now["status"] != "cancelling":
                        since = now[f"{status}_at"] or int(time.time())
                        self._data.update(batch["id"], **{"status": status, f"{status}_at": since})
            if time.time() >= batch["expires_at"]:
                current.stop.set()

        assert self._model is not None
        summary = run(settings, self._model, report, stop=current.stop)
        current.counts = _counts(summary.lines, summary.done, summary.failed)
        return not summary.stopped

    def _expire(self, settings: BatchSettings, current: Current) -> None:
        """Writes down the requests that there was no time for."""
        source = Source(settings.source)
        message = "there was no time for this request within the completion window"
        with Ledger(settings, source, detect(settings, source)) as ledger:
            for record in source.records():
                if record.line in ledger.lines:
                    continue
                try:
                    late = ledger.form.read(record)
                    refusal = Refusal(late.line, late.custom_id, ApiError(400, message, code="batch_expired"))
                except Refusal as error:
                    refusal = error
                ledger.put(refused(ledger.form, refusal))
            current.counts = _counts(ledger.done + ledger.failed, ledger.done, ledger.failed)


def _plainly(error: ConfigError, settings: BatchSettings, batch: Json) -> str:
    """What is wrong, without the names that things have on the server's disk."""
    message = str(error).partition("; --restart")[0]
    for path, name in ((settings.source, batch["input_file_id"]), (settings.target, batch["id"])):
        message = message.replace(os.path.realpath(path), name).replace(str(path), name)
    return message


def _counts(total: int, completed: int, failed: int) -> Json:
    return {"total": total, "completed": completed, "failed": failed}


def _usage(answers: Path) -> Json:
    """Tokens of all answers of a file, whichever server gave them."""
    given = read = reused = thought = 0
    if answers.exists():
        with answers.open("rb") as file:
            for line in file:
                usage = json.loads(line)["response"]["body"].get("usage") or {}
                read += usage.get("prompt_tokens", usage.get("input_tokens", 0))
                given += usage.get("completion_tokens", usage.get("output_tokens", 0))
                details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
                reused += details.get("cached_tokens", 0)
                details = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
                thought += details.get("reasoning_tokens", 0)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": reused},
        "output_tokens": given,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": read + given,
    }
