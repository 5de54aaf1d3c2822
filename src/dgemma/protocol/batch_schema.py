"""The request of `/v1/batches`: every published field, honoured or refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Body, Metadata

LEAST_SECONDS, MOST_SECONDS = 3600, 2592000  # that a file may be kept, where it is not for ever


class ExpiresAfter(Body):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)]


class BatchRequest(Body):
    """A file of requests to one endpoint. There are 24 hours for them; what is not answered then expires."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
