"""A small server for the tests of the web page: it serves the page and makes up replies that settle.

No model and no clock decides anything: the same message gives the same drafts. `Stub.drafts` has what was sent last.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "dgemma" / "server" / "page.html"
CANVAS, STEPS, LIMIT = 24, 6, 48
END = "<eos>"
NOISE_WORDS = [" river", "ing", " the", " 7", "\n", " quartz", ".", " un", " of", " lantern", "<unused9>", " é"]
POEM = (
    "A fox went out at break of day and found the river slow and grey. "
    "It crossed the stones, it climbed the hill, and all the wood below was still."
)


def pieces_of(text: str) -> list[str]:
    """Tokens of a text: words with the space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def settling(
    text: str, *, canvas_length: int = CANVAS, steps: int = STEPS
) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """For each canvas of `text`: its drafts and what it commits.

    In the middle of a full canvas one settled word is a wrong one, and the last position is guessed before it settles.
    """
    words = pieces_of(text)
    total = 0
    for canvas, start in enumerate(range(0, max(1, len(words)), canvas_length)):
        here = words[start : start + canvas_length]
        whole = here + [END] * (canvas_length - len(here))
        rng = random.Random(f"{text} {canvas}")
        order = sorted(range(canvas_length), key=lambda i: (whole[i] != END, rng.random()))
        drafts: list[dict[str, Any]] = []
        before: list[str] | None = None
        for step in range(1, steps + 1):
            total += 1
            known = set(order[: -(-canvas_length * step // steps)])
            pieces = [
                whole[i] if i in known or i == order[-1] else rng.choice(NOISE_WORDS) for i in range(canvas_length)
            ]
            if step == steps // 2 and order[0] < len(here):
                pieces[order[0]] = " wrong"
            entropies = [
                0.4
                if i == order[-1] and i not in known
                else round(0.01 + 0.02 * rng.random(), 3)
                if i in known
                else round(1 + 4 * rng.random(), 3)
                for i in range(canvas_length)
            ]
            shown = "".join(pieces[: pieces.index(END)] if END in pieces else pieces)
            drafts.append(
                {
                    "choice": 0,
                    "canvas": canvas,
                    "step": step,
                    "max_steps": LIMIT,
                    "mean_entropy": sum(entropies) / canvas_length,
                    "tokens_per_forward": (start + len(here)) / total,
                    "text": shown,
                    "pieces": pieces,
                    "settled": [i in known for i in range(canvas_length)],
                    "changed": [before is None or before[i] != pieces[i] for i in range(canvas_length)],
                    "entropies": entropies,
                }
            )
            before = pieces
        yield drafts, "".join(here)


@dataclass(kw_only=True)
class Stub:
    """A server on a port of its own. Set `mode` before a message is sent.

    Modes: "settle"; "plain" (no drafts); "broken" (an error event after the first canvas); "cut" (the connection dies
    after the first canvas); "busy" (429); "refused" (400); "forever" (never ends).
    """

    mode: str = "settle"
    reply: str = POEM
    thoughts: str = ""
    delay: float = 0.01  # seconds between drafts
    key: str | None = None
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of completions
    seen: list[str] = field(default_factory=list)  # paths of every request
    drafts: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)  # a client left in the middle of a reply
    hold: threading.Event = field(default_factory=threading.Event)  # cleared: drafts wait after the third

    def __enter__(self) -> Stub:
        self.hold.set()
        stub = self

        class Handler(_Handler):
            """Answers for this stub."""

        Handler.stub = stub
        self.connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):  # a browser keeps them open for its next request
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.stub.connections.add(self.connection)

    def finish(self) -> None:
        self.stub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.stub.seen.append(self.path)
        if self.path == "/":
            self._whole(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/health":
            self._json(200, {"status": "ready"})
        elif self.path == "/v1/models" and self._allowed():
            self._json(200, {"object": "list", "data": [{"id": "stub-1", "object": "model"}]})
        elif self.path != "/v1/models":
            self._json(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        self.stub.seen.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.stub.requests.append(body)
        if self.stub.mode == "busy":
            self._json(429, {"error": {"message": "queue full"}}, {"Retry-After": "7"})
        elif self.stub.mode == "refused":
            self._json(400, {"error": {"message": "canvas_length: 9999 is more than the model's 256"}})
        else:
            self._stream(body)

    def _allowed(self) -> bool:
        if self.stub.key is None or self.headers.get("Authorization") == f"Bearer {self.stub.key}":
            return True
        self._json(401, {"error": {"message": "the API key is missing or wrong"}})
        return False

    def _stream(self, body: dict[str, Any]) -> None:
        stub = self.stub
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._reply(body)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            stub.gone.set()
            self.close_connection = True

    def _reply(self, body: dict[str, Any]) -> None:
        stub = self.stub
        stub.drafts = []
        text = stub.reply
        diffusion = body.get("diffusion", {})
        steps = tokens = 0
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if stub.thoughts:
            self._event({"choices": [{"index": 0, "delta": {"reasoning_content": stub.thoughts}}]})
        while True:
            for drafts, committed in settling(text, canvas_length=diffusion.get("canvas_length", CANVAS)):
                for draft in drafts:
                    time.sleep(stub.delay)
                    if draft["step"] == 4:
                        stub.hold.wait(20)
                    if stub.mode != "plain":
                        stub.drafts.append(draft)
                        self._event({"choices": [{"index": 0, "delta": {}}], "diffusion": {"draft": draft}})
                self._event({"choices": [{"index": 0, "delta": {"content": committed}}]})
                steps += len(drafts)
                tokens += len(pieces_of(committed))
                if stub.mode == "broken":
                    self._event({"error": {"message": "not numbers (NaN) in the logits"}})
                    return
                if stub.mode == "cut":
                    self.close_connection = True
                    with suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
            if stub.mode != "forever":
                break
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"completion_tokens": tokens, "completion_tokens_details": {"denoising_steps": steps}}
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps({'object': 'chat.completion.chunk', **event})}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._whole(status, json.dumps(value).encode(), "application/json", headers)

    def _whole(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
