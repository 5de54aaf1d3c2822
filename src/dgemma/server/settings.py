"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Fields:
        host, port: what it listens on; port 0 takes a free one.
        api_key: what `/v1/*` asks for as `Authorization: Bearer …`; None asks for nothing.
        allow_origins: web origins whose pages may call it (CORS), `*` for all; none by default.
        max_body_bytes: of a request at most.
        max_choices: answers of one request at most (`n` times prompts).
        request_seconds: from a request's arrival to the end of its answer; None for no limit.
        drain_seconds: what running requests get to finish after SIGTERM.
        body_seconds: a client gets to send its body.
        stall_seconds: a client that reads nothing is waited for.
        data_dir: where uploaded files and batches are kept; None for the user's own folder. It is made when the first
            file comes.
        max_file_bytes: of an uploaded file at most.
        max_responses, max_response_bytes: how many responses, of what size together, `previous_response_id` may
            refer back to.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_choices: int = 128
    request_seconds: float | None = 600.0
    drain_seconds: float = 30.0
    body_seconds: float = 60.0
    stall_seconds: float = 60.0
    data_dir: Path | None = None
    max_file_bytes: int = 200 * 2**20
    max_responses: int = 1000
    max_response_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if not self.host or any(character.isspace() for character in self.host):
            raise ConfigError(f"host: {self.host!r} is not the name or address of a machine")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not from 0 to 65535")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ConfigError("api_key: needs letters, digits and signs of ASCII, at least one")
        for name in (f.name for f in fields(self) if f.name.startswith("max_") or f.name.endswith("_seconds")):
            value = getattr(self, name)
            if value is not None and not value > 0 and not (name == "drain_seconds" and value == 0):
                raise ConfigError(f"{name}: {value} is not above 0")
