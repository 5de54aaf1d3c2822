"""Which body belongs to which endpoint."""

from __future__ import annotations

from typing import Any

from .body import check
from .call import Call
from .chat import ChatCall
from .chat_schema import ChatRequest
from .completions import CompletionCall
from .completions_schema import CompletionRequest
from .errors import ApiError
from .responses import Earlier, ResponseCall
from .responses_schema import ResponseRequest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
URLS = (CHAT, COMPLETIONS, RESPONSES)


def read_call(url: str, body: Any, *, earlier: Earlier | None = None) -> Call:
    """A request to an endpoint, checked.

    Args:
        url: the endpoint's path.
        body: parsed JSON.
        earlier: gives the conversation up to the end of a response of this id, for `previous_response_id`; None where
            no responses are kept.

    Raises:
        ApiError: 400, naming the first field that is wrong; 404 where there is no such endpoint.
    """
    if url == CHAT:
        return ChatCall.read(check(body, ChatRequest))
    if url == COMPLETIONS:
        return CompletionCall.read(check(body, CompletionRequest))
    if url == RESPONSES:
        return ResponseCall.read(check(body, ResponseRequest), earlier)
    raise ApiError(404, f"url: {url[:200]!r} is not one of {', '.join(URLS)}", param="url", code="not_found")
