"""What every request passes before and after its endpoint: record, key, the last word on errors."""

from __future__ import annotations

import hmac
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.errors import ApiError
from .errors import internal
from .logs import Record, logger
from .service import Service


def error_response(request: Request, error: ApiError) -> JSONResponse:
    """An error as the client gets it, noted in the request's record."""
    request.state.record.error = error.code
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Recorded:
    """Gives each request a record and an id, counts it, logs it, and answers what went wrong with 500."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = Record(method=scope["method"], path=scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        self.service.open_requests += 1
        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            logger.log(logging.ERROR, "the server failed", exc_info=error, extra={"about": {"id": record.id}})
            if record.status is None:
                record.error = internal().code
                await JSONResponse(internal().body(), 500)(scope, receive, noted)
        finally:
            self.service.open_requests -= 1
            route = scope.get("route")
            record.endpoint = getattr(route, "path", "other")
            self.service.metrics.answered(record)
            record.write()


class Keyed:
    """Asks for the key before anything below `/v1/`."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # Compared in constant time, whatever its length.
            right = hmac.compare_digest(given.strip().encode(), self.key)
            if scheme.lower() != "bearer" or not right:
                message = "Authorization: needs to be `Bearer` and this server's key"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                return await error_response(Request(scope), error)(scope, receive, send)
        await self.app(scope, receive, send)
