"""What a client is told when a request is refused or fails, in the form that OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CapacityError, DGemmaError, Draining, QueueFull

RETRY_SECONDS = 1  # what a full queue asks a client to wait
RESTART_SECONDS = 5  # what a server that starts or stops asks for
_FIELD = re.compile(r"([A-Za-z_]+)([\w.\[\]]*): ", re.ASCII)


class ApiError(Exception):
    """An error with the status and body that the client gets.

    Fields:
        status: of HTTP; message: what is wrong and how to mend it.
        kind: OpenAI's `type`; param: the field of the request that is to blame; code: a short name for programs.
        headers: sent besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be honoured; the message gets its name in front."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """The server takes no requests now."""
    headers = {"Retry-After": str(RESTART_SECONDS)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def from_engine(error: DGemmaError, names: Mapping[str, str], *, running: bool = False) -> ApiError:
    """What the client is told of an error that the engine raised.

    Args:
        error: its message may begin with the name of a setting and a colon.
        names: how this request spells settings: `max_new_tokens` is `max_tokens` in a chat request.
        running: whether the request was accepted and failed later.
    """
    if isinstance(error, Draining):
        return unavailable("the server is shutting down and takes no new requests", "draining")
    message, param, head = str(error), None, ""
    found = _FIELD.match(message)
    if found and found[1] in names:
        # Places in a prompt are those of the request only where it has the engine's own form.
        param = names[found[1]] + (found[2] if names[found[1]] == found[1] else "")
        head, message = f"{param}: ", message[found.end() :]
    message = head + message.replace("max_new_tokens", names.get("max_new_tokens", "max_new_tokens"))
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if running:
        return ApiError(400, message, param=param, code="generation_failed")
    code = "context_length_exceeded" if isinstance(error, CapacityError) else "invalid_value"
    return ApiError(400, message, param=param, code=code)
