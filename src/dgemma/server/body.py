"""Bodies of HTTP requests, read within limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from ..protocol.body import parse
from ..protocol.errors import ApiError

CLOSE = {"Connection": "close"}  # what is still to come of the body is no next request
DISCARD_SECONDS = 2.0  # a client that still sends a body which is too large gets this long to read the answer


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> Any:
    """The request's JSON body.

    Raises:
        ApiError: 400 for what is no JSON, 408 where the body does not come within `seconds`,
            413 for more than `max_bytes`, 415 for another content type than JSON.
        ClientDisconnect: the client left while it sent.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type: needs to be application/json", code="unsupported_media_type")
    try:
        async with asyncio.timeout(seconds):
            data = await _read(request, max_bytes)
    except TimeoutError:
        message = f"the body did not come within {seconds:g} seconds"
        raise ApiError(408, message, code="request_timeout", headers=CLOSE) from None
    return parse(data)


async def _read(request: Request, max_bytes: int) -> bytes:
    return b"".join([chunk async for chunk in limited(request, max_bytes)])


async def limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes.

    Raises:
        ApiError: 413 once it is larger than that.
        ClientDisconnect: the client left while it sent.
    """
    length = request.headers.get("content-length", "")
    size = int(length[:20]) if length.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                break
            yield chunk
    if size > max_bytes:
        # Closing on a client that is still sending would take the answer away from it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                async for _ in request.stream():
                    pass
        raise ApiError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large", headers=CLOSE)
