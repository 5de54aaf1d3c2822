"""Many streaming clients against `dgemma serve` on this machine: errors, mixed-up text, memory, waiting.

    python benchmarks/serve_load.py [--clients 200] [--seconds 60]

Each client sends one streamed request after another. Every text is compared with the same request's answer alone. The
clients share the machine with the server. Raw records go under benchmarks/results/; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import Results

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.tasks import held_out

FAMILIES = ("sums", "sorting", "sudoku", "records", "calendar")
KINDS = 40  # different requests


def requests() -> list[dict[str, Any]]:
    """Bodies of chat completions over all families."""
    prompts = [e.prompt for group in zip(*(held_out(f, KINDS, 3) for f in FAMILIES), strict=True) for e in group]
    return [
        {
            "model": "demo",
            "messages": [{"role": "user", "content": prompt}],
            "seed": seed,
            "max_tokens": 96,
            "stream": True,
            "stream_options": {"include_usage": True},
            "diffusion": {"canvas_length": 64, "early_text": "safe"},
        }
        for seed, prompt in enumerate(prompts[:KINDS])
    ]


def answers(bodies: list[dict[str, Any]]) -> list[str]:
    """What each request gets alone, in this process."""
    model = dgemma.load("demo", engine=EngineSettings(max_batch=1))
    texts = []
    for body in bodies:
        params = SamplingParams(seed=body["seed"], max_new_tokens=body["max_tokens"], **body["diffusion"])
        texts.append(model.generate(body["messages"], params).text)
    return texts


async def ask(port: int, body: dict[str, Any]) -> tuple[str, float, float, int]:
    """One streamed request: text, seconds to first text, seconds in all, tokens."""
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    text, first, tokens, done = "", 0.0, 0, False
    async for line in reader:
        if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
            raise RuntimeError(line.decode())
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            break
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            if piece and not first:
                first = time.perf_counter() - started
            text += piece
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    if not done:
        raise RuntimeError("the stream ended before [DONE]")
    return text, first, time.perf_counter() - started, tokens


async def load(
    port: int, pid: int, clients: int, seconds: float, bodies: list[dict[str, Any]], wanted: list[str], out: Results
) -> None:
    """Clients in parallel until the time is up; every request that was begun is finished and recorded."""
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            kind = (number * 7 + turn) % len(bodies)
            record: dict[str, Any] = {"section": "request", "client": number, "turn": turn, "kind": kind}
            try:
                text, first, whole, tokens = await ask(port, bodies[kind])
                record |= {"right": text == wanted[kind], "first": first, "seconds": whole, "tokens": tokens}
            except (RuntimeError, OSError) as error:
                record |= {"error": str(error)}
            out.add(**record)
            turn += 1

    async def watch() -> None:
        while True:
            out.add(section="memory", at=seconds - (end - time.perf_counter()), bytes=resident(pid))
            await asyncio.sleep(1.0)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(clients)))
    watcher.cancel()


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def server() -> Iterator[tuple[int, int]]:
    """A `dgemma serve` of its own: (port, process id)."""
    command = [sys.executable, "-m", "dgemma", "serve", "--port", "0", "--log-level", "warning"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = None
    while found is None:
        line = process.stderr.readline()
        if not line:
            raise RuntimeError("the server did not start")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    try:
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def main() -> None:
    """Runs the load and sums it up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    bodies = requests()
    wanted = answers(bodies)
    out = Results("serve-load", {"clients": args.clients, "seconds": args.seconds}, args.out)
    with server() as (port, pid):
        asyncio.run(ask(port, bodies[0]))
        started = time.perf_counter()
        asyncio.run(load(port, pid, args.clients, args.seconds, bodies, wanted, out))
        seconds = time.perf_counter() - started
    done = [r for r in out.records if r["section"] == "request"]
    good = [r for r in done if r.get("right")]
    waits = sorted(r["first"] for r in good)
    memory = [r["bytes"] / 2**20 for r in out.records if r["section"] == "memory"]
    each = [sum(r["client"] == n for r in good) for n in range(args.clients)]
    figures = {
        "requests": len(done),
        "errors": sum("error" in r for r in done),
        "wrong_texts": sum(r.get("right") is False for r in done),
        "tokens_per_second": sum(r["tokens"] for r in good) / seconds,
        "first_text_median": statistics.median(waits),
        "first_text_95": waits[int(0.95 * len(waits))],
        "first_text_most": waits[-1],
        "answers_a_client": [min(each), max(each)],
        "memory_mib": [round(memory[len(memory) // 4]), round(memory[-1])],
    }
    rows = "\n".join(f"- {name}: {figure}" for name, figure in figures.items())
    title = f"# {args.clients} streaming clients for {args.seconds:.0f} s"
    sys.stdout.write(out.close(f"{title}\n\n{rows}\n", figures) + "\n")


if __name__ == "__main__":
    main()
