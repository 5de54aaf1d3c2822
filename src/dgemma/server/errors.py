"""Errors that only a server has."""

from __future__ import annotations

from ..protocol.errors import ApiError


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


def internal() -> ApiError:
    """Our own mistake; what it was is in the log alone."""
    return ApiError(500, "the server failed; its log has the cause", kind="server_error", code="internal_error")


def timed_out(seconds: float) -> ApiError:
    """The answer took longer than the server allows."""
    return ApiError(504, f"no answer within {seconds:g} seconds", kind="server_error", code="timeout")
