"""One JSON line a request. Prompts and answers are never in it."""

from __future__ import annotations

import datetime
import json
import logging
import time
import traceback
import uuid
from dataclasses import dataclass, field
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("dgemma.server")


@dataclass
class Record:
    """What is known of a request; its figures grow while it is answered.

    Fields:
        id: sent back as `X-Request-Id`.
        endpoint: the path as it is registered, such as `/v1/models/{name}`; "other" for an unknown one.
        started: of `time.perf_counter`.
        finish_reason: "stop" or "length" of the last answer; "disconnected" or "stalled" where the client is to blame.
        error: the code of what it was refused for, or failed by.
    """

    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    endpoint: str = "other"
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    first_text_seconds: float | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.started

    def write(self) -> None:
        """Writes the line."""
        about: dict[str, Any] = {
            "id": self.id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.prompt_tokens:
            about |= {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "steps": self.steps,
            }
        if self.first_text_seconds is not None:
            about["first_text_seconds"] = round(self.first_text_seconds, 4)
        for name in ("finish_reason", "error"):
            if getattr(self, name):
                about[name] = getattr(self, name)
        level = logging.ERROR if self.status is None or self.status == 500 else logging.INFO
        logger.log(level, "request", extra={"about": about})


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time (UTC), level, message, and what stands in its `about`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            # An exception's message may quote the prompt; where it was raised says as much to who mends it.
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["trace"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
            ]
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str) -> None:
    """Sends the package's log, and uvicorn's warnings, to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    ours, theirs = logging.getLogger("dgemma"), logging.getLogger("uvicorn.error")
    for target in (ours, theirs):
        target.handlers, target.propagate = [handler], False
    ours.setLevel(level.upper())
    theirs.setLevel(max(logging.WARNING, ours.level))
