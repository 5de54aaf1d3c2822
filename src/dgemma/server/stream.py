"""Server-sent events to a client that may vanish or stop reading."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..events import Result
from ..protocol.errors import ApiError
from .errors import ClientGone, internal
from .job import Job
from .logs import Record, logger

Made = TypeVar("Made")
DONE = "data: [DONE]\n\n"


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def sse(value: Any, name: str | None = None) -> str:
    """One event."""
    return (f"event: {name}\n" if name else "") + f"data: {to_json(value)}\n\n"


async def attended(receive: Receive, work: Coroutine[Any, Any, Made]) -> Made:
    """What `work` makes, as long as the client is there to get it. The request's body has been read.

    Raises:
        ClientGone: the client left; `work` has been cancelled.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A job's answers as server-sent events. Starlette's own notices a client that has left only when it next sends.

    Args:
        job: closed when the stream ends, however it does.
        events: the events, ready to be sent.
        failure: the last event of a stream that fails.
        stall_seconds: how long a client may read nothing.
        record: of the request.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Job,
        events: AsyncIterator[str],
        *,
        failure: Callable[[ApiError], str],
        stall_seconds: float,
        record: Record,
    ):
        # Proxies would collect the events otherwise.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job, self._events, self._failure = job, events, failure
        self._stall_seconds, self._record = stall_seconds, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client is gone."""
        try:
            await attended(receive, self._send_all(send))
        except ClientGone:
            self._record.finish_reason = "disconnected"
        except TimeoutError:
            self._record.finish_reason = "stalled"
            logger.warning("a client stopped reading", extra={"about": {"id": self._record.id}})
        finally:
            self._job.close()

    async def _send_all(self, send: Send) -> None:
        async def give(message: Message) -> None:
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        await give({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await give({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except TimeoutError:
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.log(logging.ERROR, "a stream failed", exc_info=error, extra={"about": {"id": self._record.id}})
                error = internal()
            self._record.error = error.code
            last = self._failure(error)
            await give({"type": "http.response.body", "body": last.encode(), "more_body": True})
        await give({"type": "http.response.body", "body": b"", "more_body": False})


async def respond(
    request: Request,
    job: Job,
    *,
    whole: Callable[[Sequence[Result], int], dict[str, Any]],
    events: AsyncIterator[str] | None,
    failure: Callable[[ApiError], str],
) -> Response:
    """A job's answer, in the form that was asked for; the job is closed with it.

    Args:
        whole: makes the JSON body of all results and the number of prompt tokens.
        events: makes the stream, where one was asked for.
        failure: makes the last event of a stream that fails.
    """
    record: Record = request.state.record
    if events is not None:
        stall_seconds = request.app.state.service.settings.stall_seconds
        return EventStream(job, events, failure=failure, stall_seconds=stall_seconds, record=record)
    try:
        results = await attended(request.receive, job.collect())
        return JSONResponse(whole(results, job.prompt_tokens))
    finally:
        job.close()
