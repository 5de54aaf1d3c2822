"""`/v1/files`: what batches are made from, and what they have made."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from .query import page, read_query
from .service import Service
from .upload import read_upload

MOST_FILES = 10_000  # of a page


async def create_file(request: Request) -> Response:
    """Keeps a file of batch requests.

    Raises:
        ApiError: it cannot be honoured, or stored.
    """
    service: Service = request.app.state.service
    service.serving()
    settings = service.settings
    form = read_upload(request, max_bytes=settings.max_file_bytes, seconds=settings.body_seconds)
    async with form as upload:
        add = service.data.add_file
        return JSONResponse(await asyncio.to_thread(add, upload.file, upload.filename, upload.purpose, upload.seconds))


def list_files(request: Request) -> Response:
    """The files that are kept, the newest first.

    Raises:
        ApiError: the query is wrong.
    """
    service: Service = request.app.state.service
    service.serving()
    others = {"purpose": (), "order": ("asc", "desc")}
    query = read_query(request, most=MOST_FILES, usual=MOST_FILES, others=others)
    newest = query.pop("order") != "asc"
    return JSONResponse(page(*service.data.files(**query, newest=newest)))


def get_file(file_id: str, request: Request) -> Response:
    """What is known of a file.

    Raises:
        ApiError: there is none of this id.
    """
    service: Service = request.app.state.service
    service.serving()
    return JSONResponse(service.data.file(file_id))


def get_content(file_id: str, request: Request) -> Response:
    """What is in a file.

    Raises:
        ApiError: there is none of this id.
    """
    service: Service = request.app.state.service
    service.serving()
    file = service.data.file(file_id)
    path = service.data.content(file["id"])
    return FileResponse(path, media_type="application/octet-stream", filename=file["filename"], stat_result=path.stat())


def delete_file(file_id: str, request: Request) -> Response:
    """Forgets a file.

    Raises:
        ApiError: there is none of this id, or a batch still needs it.
    """
    service: Service = request.app.state.service
    service.serving()
    service.data.delete_file(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})
