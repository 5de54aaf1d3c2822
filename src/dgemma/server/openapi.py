"""`/openapi.json`: the requests as pydantic checks them, the errors as they are sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ..protocol.batch_schema import LEAST_SECONDS, MOST_SECONDS, BatchRequest
from ..protocol.chat_schema import ChatRequest
from ..protocol.completions_schema import CompletionRequest
from ..protocol.fields import Body
from ..protocol.responses_schema import ResponseRequest

PLACE = "#/components/schemas/{model}"
ERRORS = {
    400: "A field is wrong, missing, unknown or not supported; `param` names it.",
    401: "The key is missing or wrong.",
    404: "The model, the response, the file or the batch is not known.",
    408: "The body did not come in time.",
    409: "The batch has ended.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "The server failed.",
    503: "The model is being loaded, or the server shuts down.",
    504: "The answer took too long.",
    507: "The server cannot store it.",
}
BODY_ERRORS = (400, 401, 408, 413, 415, 500, 503)
FORMS: tuple[type[Body], ...] = (BatchRequest, ChatRequest, CompletionRequest, ResponseRequest)
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "minLength": 1},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": LEAST_SECONDS, "maximum": MOST_SECONDS},
    },
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def takes(form: type[Body], answer: str, *, stream: bool = True) -> dict[str, Any]:
    """What a route of this request body says of itself.

    Args:
        answer: `object` of its response.
        stream: whether that may be a stream.
    """
    content = {"application/json": {"schema": {"$ref": PLACE.format(model=form.__name__)}}}
    good: dict[str, Any] = {
        "description": "The answer, or with `stream` the events that make it up." if stream else "The answer.",
        "content": {"application/json": {"schema": _object(answer)}},
    }
    if stream:
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: good, **fails(*BODY_ERRORS, *((404, 429, 504) if stream else (404, 507)))},
    }


def takes_file() -> dict[str, Any]:
    """What the route that takes files says of itself."""
    content = {"multipart/form-data": {"schema": _UPLOAD}}
    good = {"description": "The answer.", "content": {"application/json": {"schema": _object("file")}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: good, **fails(*BODY_ERRORS, 507)},
    }


def gives(answer: str | None, *errors: int, query: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What a route without a body says of itself.

    Args:
        answer: `object` of its response; None for a file.
        query: parameters that it takes.
    """
    content = (
        {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        if answer is None
        else {"application/json": {"schema": _object(answer)}}
    )
    good = {"description": "The answer.", "content": content}
    return {"responses": {200: good, **fails(*errors)}, "openapi_extra": {"parameters": query} if query else None}


def page_query(most: int, *, files: bool = False) -> list[dict[str, Any]]:
    """The parameters of a list whose pages hold so many objects at most."""
    kinds: dict[str, dict[str, Any]] = {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": most},
    }
    if files:
        kinds |= {"purpose": {"type": "string"}, "order": {"type": "string", "enum": ["asc", "desc"]}}
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in kinds.items()]


def fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    content = {"application/json": {"schema": {"$ref": PLACE.format(model="Error")}}}
    return {status: {"description": ERRORS[status], "content": content} for status in statuses}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = {"Error": _ERROR}
    for form in FORMS:
        schema = form.model_json_schema(ref_template=PLACE)
        schemas |= schema.pop("$defs", {})
        schemas[form.__name__] = schema
    components = document.setdefault("components", {})
    components["schemas"] = schemas
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own error, which never comes
            operation["description"] = operation["description"].partition("\n\n")[0]
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}, {}]
    return document


def _object(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["object"],
        "properties": {"object": {"const": name}},
    }
