"""`dgemma serve`: the HTTP server and the web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .failures import warn
from .terminal import say

if TYPE_CHECKING:
    from ..api import Model

LOOPBACK = ("localhost", "::1", "127.")


@click.command(short_help="The HTTP server, OpenAI-compatible, with a web page.")
@options.flags(
    *options.MODEL_FLAGS,
    click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME",
                 help="Address to listen on; 0.0.0.0 lets other machines in."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
                 help="Port to listen on; 0 takes a free one."),
    click.option("--api-key", envvar="DGEMMA_API_KEY", show_envvar=True, metavar="KEY",
                 help="What clients must send as `Authorization: Bearer KEY`. The variable keeps it out of `ps`."),
    click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True,
                 help="Requests that run at once."),
    click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True,
                 help="Requests that may wait; more are answered 429."),
    click.option("--max-model-len", type=click.IntRange(min=1), metavar="N",
                 help="Tokens of a prompt and its answer at most.  [default: the model's context]"),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
                 metavar="SECONDS", help="How long a request may take, from its arrival to its end."),
    click.option("--drain-seconds", type=click.FloatRange(min=0), default=30, show_default=True, metavar="SECONDS",
                 help="What running requests get to finish when the server is told to stop."),
    click.option("--max-body", type=click.IntRange(min=1), default=8 * 2**20, show_default=True, metavar="BYTES",
                 help="Size of a request's body at most."),
    click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                 envvar="DGEMMA_DATA_DIR", show_envvar=True,
                 help="Where uploaded files and batches are kept.  [default: a folder of the user's own]"),
    click.option("--max-file", type=click.IntRange(min=1), default=200 * 2**20, show_default=True, metavar="BYTES",
                 help="Size of an uploaded file at most."),
    click.option("--allow-origin", multiple=True, metavar="ORIGIN",
                 help="Let pages of this web origin call the server (CORS), `*` all; may be repeated."),
    click.option("--log-level", type=click.Choice(("debug", "info", "warning", "error")), default="info",
                 show_default=True, help="What is logged: at `info` one JSON line a request, never its text."),
)  # fmt: skip
def serve(**values: Any) -> int:
    """Serves a model over HTTP until it is told to stop (Ctrl-C, SIGTERM).

    \b
    dgemma serve
    dgemma serve --model google/diffusiongemma-26B-A4B-it --port 8080
    DGEMMA_API_KEY=secret dgemma serve --host 0.0.0.0

    The first signal lets running requests finish, the second ends at once.
    """
    from ..server.logs import set_up
    from ..server.run import serve as run_server
    from ..server.settings import ServerSettings

    settings = ServerSettings(
        host=values["host"],
        port=values["port"],
        api_key=values["api_key"],
        allow_origins=values["allow_origin"],
        max_body_bytes=values["max_body"],
        request_seconds=values["timeout"],
        drain_seconds=values["drain_seconds"],
        data_dir=values["data_dir"],
        max_file_bytes=values["max_file"],
    )
    set_up(values["log_level"])

    def load() -> Model:
        import dgemma

        limits = {name: values[name] for name in ("max_batch", "max_queue", "max_model_len")}
        return dgemma.load(values["model"], **options.load_settings(values), engine=dgemma.EngineSettings(**limits))

    def ready(model: Any, address: str) -> None:
        if settings.api_key is None and not settings.host.startswith(LOOPBACK):
            warn(f"--host: {settings.host} lets other machines in, and there is no --api-key to keep them out")
        say(f"serving {model.name} on {address} (Ctrl-C stops)")

    return run_server(settings, load, on_ready=ready)
