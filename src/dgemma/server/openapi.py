"""`/openapi.json`: the requests as pydantic checks them, the errors as they are sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .chat_schema import ChatRequest
from .completions_schema import CompletionRequest
from .fields import Body
from .responses_schema import ResponseRequest

PLACE = "#/components/schemas/{model}"
ERRORS = {
    400: "A field is wrong, missing, unknown or not supported; `param` names it.",
    401: "The key is missing or wrong.",
    404: "The model or the response is not known.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "The server failed.",
    503: "The model is being loaded, or the server shuts down.",
    504: "The answer took too long.",
}
FORMS: tuple[type[Body], ...] = (ChatRequest, CompletionRequest, ResponseRequest)
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


def takes(form: type[Body], answer: str) -> dict[str, Any]:
    """What a route of this request body says of itself; `answer` describes its response, `object` by name."""
    content = {"application/json": {"schema": {"$ref": PLACE.format(model=form.__name__)}}}
    whole = {"schema": _object(answer)}
    good = {
        "description": "The answer, or with `stream` the events that make it up.",
        "content": {"application/json": whole, "text/event-stream": {"schema": {"type": "string"}}},
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: good, **fails(*ERRORS)},
    }


def gives(answer: str, *errors: int) -> dict[str, Any]:
    """What a route without a body says of itself."""
    good = {"description": "The answer.", "content": {"application/json": {"schema": _object(answer)}}}
    return {"responses": {200: good, **fails(*errors)}}


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
