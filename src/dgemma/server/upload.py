"""Files that come in forms (`multipart/form-data`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..protocol.batch_schema import ExpiresAfter
from ..protocol.body import check
from ..protocol.errors import ApiError, invalid
from .body import CLOSE, limited

FORM_BYTES = 64 << 10  # of a form besides its file
MOST_NAME = 255  # characters of a file's name
EXPIRES = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file as it came. Fields: `seconds`, how long it is to be kept; None for ever."""

    file: BinaryIO
    filename: str
    purpose: str
    seconds: int | None


@asynccontextmanager
async def read_upload(request: Request, *, max_bytes: int, seconds: float) -> AsyncIterator[Upload]:
    """The request's form; its file is gone afterwards.

    Raises:
        ApiError: 400 for a field that is wrong, missing or unknown, 408 where nothing comes for so many seconds, 413
            for a file of more than `max_bytes`, 415 for another content type.
        ClientDisconnect: the client left while it sent.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, "Content-Type: needs to be multipart/form-data", code="unsupported_media_type")
    stream = _in_time(limited(request, max_bytes + FORM_BYTES), seconds)
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=8, max_part_size=FORM_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the body is not a valid form ({error.message})", code="invalid_form") from None
    try:
        yield _checked(form.multi_items(), max_bytes)
    finally:
        await form.close()


async def _in_time(chunks: AsyncGenerator[bytes, None], seconds: float) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"nothing of the body came within {seconds:g} seconds"
            raise ApiError(408, message, code="request_timeout", headers=CLOSE) from None
        yield chunk


def _checked(items: list[tuple[str, str | UploadFile]], max_bytes: int) -> Upload:
    fields: dict[str, str | UploadFile] = {}
    for name, value in items:
        if name not in ("file", "purpose", *EXPIRES):
            raise invalid(name[:64], "is not known", "unknown_parameter")
        if name in fields:
            raise invalid(name, "is given twice")
        fields[name] = value
    for name in ("file", "purpose"):
        if name not in fields:
            raise invalid(name, "is missing", "missing_required_parameter")
    file = fields.pop("file")
    if not isinstance(file, UploadFile):
        raise invalid("file", "needs to be a file: a part with a filename", "invalid_type")
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    if len(texts) < len(fields):
        raise invalid(next(name for name in fields if name not in texts), "needs to be a text", "invalid_type")
    purpose = texts["purpose"]
    if purpose != "batch":
        raise invalid("purpose", "is not supported: files are here for batches alone", "unsupported_value")
    if not file.size:
        raise invalid("file", "is empty")
    if file.size > max_bytes:
        raise ApiError(413, f"file: is larger than {max_bytes} bytes", param="file", code="request_too_large")
    filename = PurePosixPath((file.filename or "").replace("\\", "/")).name[:MOST_NAME] or "file"
    return Upload(file=file.file, filename=filename, purpose=purpose, seconds=_seconds(texts))


def _seconds(texts: dict[str, str]) -> int | None:
    """How long the file is to be kept."""
    given: dict[str, object] = {EXPIRES[name]: value for name, value in texts.items() if name in EXPIRES}
    if not given:
        return None
    seconds = given.get("seconds")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal() and len(seconds) < 12:
        given["seconds"] = int(seconds)
    try:
        return check(given, ExpiresAfter).seconds
    except ApiError as error:
        raise invalid(f"expires_after[{error.param}]", error.message.partition(": ")[2], error.code or "") from None
