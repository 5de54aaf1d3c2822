"""The application: endpoints, and how every error looks."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from .. import __version__
from ..protocol.batch_schema import BatchRequest
from ..protocol.chat_schema import ChatRequest
from ..protocol.completions_schema import CompletionRequest
from ..protocol.errors import ApiError
from ..protocol.read import CHAT, COMPLETIONS, RESPONSES
from ..protocol.responses_schema import ResponseRequest
from .batches import MOST_BATCHES, cancel_batch, create_batch, get_batch, list_batches
from .chat import chat_completions
from .completions import completions
from .errors import ClientGone
from .files import MOST_FILES, create_file, delete_file, get_content, get_file, list_files
from .middleware import Keyed, Recorded, error_response
from .openapi import describe, fails, gives, page_query, takes, takes_file
from .responses import create_response, delete_response, get_response
from .service import Service

FILES, BATCHES = "/v1/files", "/v1/batches"
GONE = 499  # in the log: the client left before it was answered


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service, which may get its model later."""
    app = FastAPI(
        title="dgemma",
        version=__version__,
        description="Text generation by block diffusion, by OpenAI's interface.",
        docs_url=None,  # its pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    _add_routes(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    settings = service.settings
    if settings.api_key is not None:
        app.add_middleware(Keyed, key=settings.api_key)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Recorded, service=service)
    return app


def _add_routes(app: FastAPI) -> None:
    app.post(CHAT, **takes(ChatRequest, "chat.completion"))(chat_completions)
    app.post(COMPLETIONS, **takes(CompletionRequest, "text_completion"))(completions)
    app.post(RESPONSES, **takes(ResponseRequest, "response"))(create_response)
    app.get("/v1/responses/{response_id}", **gives("response", 400, 401, 404, 503))(get_response)
    app.delete("/v1/responses/{response_id}", **gives("response", 401, 404, 503))(delete_response)
    app.post(BATCHES, **takes(BatchRequest, "batch", stream=False))(create_batch)
    app.get(BATCHES, **gives("list", 400, 401, 404, 503, query=page_query(MOST_BATCHES)))(list_batches)
    app.get(BATCHES + "/{batch_id}", **gives("batch", 401, 404, 503))(get_batch)
    app.post(BATCHES + "/{batch_id}/cancel", **gives("batch", 401, 404, 409, 503, 507))(cancel_batch)
    app.post(FILES, **takes_file())(create_file)
    app.get(FILES, **gives("list", 400, 401, 404, 503, query=page_query(MOST_FILES, files=True)))(list_files)
    app.get(FILES + "/{file_id}", **gives("file", 401, 404, 503))(get_file)
    app.get(FILES + "/{file_id}/content", **gives(None, 401, 404, 503))(get_content)
    app.delete(FILES + "/{file_id}", **gives("file", 400, 401, 404, 503, 507))(delete_file)
    app.get("/v1/models", **gives("list", 401, 503))(_models)
    app.get("/v1/models/{name:path}", **gives("model", 401, 404, 503))(_model)
    app.get("/health", responses=fails(503))(_health)
    app.get("/metrics", include_in_schema=False)(_metrics)
    app.get("/", include_in_schema=False)(_page)
    for path, endpoint in (("/health", _health), ("/metrics", _metrics), ("/", _page)):
        app.head(path, include_in_schema=False)(endpoint)  # what some load balancers ask for


async def _models(request: Request) -> Response:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_about(request.app.state.service)]})


async def _model(name: str, request: Request) -> Response:
    """The model of this name."""
    service: Service = request.app.state.service
    service.served().check_name(name)
    return JSONResponse(_about(service))


def _about(service: Service) -> dict[str, Any]:
    model = service.serving()
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dgemma",
        "max_model_len": model.engine.limit,
        "canvas_length": model.config.canvas_length,
    }


async def _health(request: Request) -> Response:
    """200 when requests are taken, else 503 with the reason as `code`: loading or draining."""
    request.app.state.service.serving()
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    text = request.app.state.service.metrics.text()
    return Response(text, media_type="text/plain; version=1.0.0; charset=utf-8")


async def _page(request: Request) -> Response:
    """The web page."""
    page = resources.files(__package__).joinpath("page.html")
    if not page.is_file():
        raise HTTPException(404)
    return HTMLResponse(page.read_text(encoding="utf-8"), headers={"cache-control": "no-cache"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:200], request.method
    message = {404: f"no such path: {path}", 405: f"{path} does not know {method}"}.get(error.status_code)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return error_response(request, ApiError(error.status_code, message or error.detail, code=code, headers=headers))


async def _gone(request: Request, error: Exception) -> Response:
    request.state.record.finish_reason = "disconnected"
    return Response(status_code=GONE)


def _described(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = describe(app)
    return app.openapi_schema
