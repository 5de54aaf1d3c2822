"""`/v1/batches`: files of requests, answered while the server has nothing better to do."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..protocol.batch_schema import BatchRequest
from ..protocol.body import check
from ..protocol.errors import invalid
from .body import read_body
from .query import page, read_query
from .service import Service

MOST_BATCHES, USUAL_BATCHES = 100, 20  # of a page


async def create_batch(request: Request) -> Response:
    """Starts a batch.

    Raises:
        ApiError: it cannot be honoured.
    """
    service: Service = request.app.state.service
    service.serving()
    settings = service.settings
    body = await read_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    form = check(body, BatchRequest)

    def create() -> Response:
        file = service.data.file(form.input_file_id, param="input_file_id")
        if file["purpose"] != "batch":
            raise invalid("input_file_id", f"is a file of purpose {file['purpose']}, not batch")
        return JSONResponse(service.batches.create(form))

    return await asyncio.to_thread(create)


def list_batches(request: Request) -> Response:
    """All batches, the newest first.

    Raises:
        ApiError: the query is wrong.
    """
    service: Service = request.app.state.service
    service.serving()
    batches, more = service.data.batches(**read_query(request, most=MOST_BATCHES, usual=USUAL_BATCHES))
    return JSONResponse(page([service.batches.live(batch) for batch in batches], more))


def get_batch(batch_id: str, request: Request) -> Response:
    """How far a batch is.

    Raises:
        ApiError: there is none of this id.
    """
    service: Service = request.app.state.service
    service.serving()
    return JSONResponse(service.batches.live(service.data.batch(batch_id)))


def cancel_batch(batch_id: str, request: Request) -> Response:
    """Ends a batch; what is answered by then becomes its output.

    Raises:
        ApiError: there is none of this id, or it has ended.
    """
    service: Service = request.app.state.service
    service.serving()
    return JSONResponse(service.batches.cancel(batch_id))
