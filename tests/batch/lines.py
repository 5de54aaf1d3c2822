"""Requests and outputs of batches, for tests: written and read without the package."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fakes import answer

from dgemma.params import SamplingParams


def request(number: int, content: str | None = None, *, custom_id: str | None = None, **body: Any) -> dict[str, Any]:
    """One line of OpenAI's format."""
    return {
        "custom_id": f"r{number}" if custom_id is None else custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "demo", "messages": [{"role": "user", "content": content or f"say {number}"}], **body},
    }


def write(path: Path, lines: Iterable[Any]) -> Path:
    """JSON lines; bytes and text are written as they are."""
    raw = [one if isinstance(one, bytes) else one.encode() if isinstance(one, str) else dump(one) for one in lines]
    path.write_bytes(b"".join(line if line.endswith(b"\n") else line + b"\n" for line in raw))
    return path


def dump(value: Any) -> bytes:
    """One line."""
    return json.dumps(value, ensure_ascii=False).encode()


def read(path: Path) -> list[dict[str, Any]]:
    """All objects of a file of JSON lines, which must be whole."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.decode().splitlines()]


def text_of(line: dict[str, Any]) -> str:
    """What a line of OpenAI's output says."""
    assert line["response"]["status_code"] == 200 and line["error"] is None
    return line["response"]["body"]["choices"][0]["message"]["content"]


def seed_of(key: str, run_seed: int = 0) -> int:
    """The formula of a request's seed."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed} {key}".encode(), digest_size=6).digest(), "big")


def expected(line: dict[str, Any], run_seed: int = 0, **params: Any) -> str:
    """What the fake model says to a line of OpenAI's format."""
    body = line["body"]
    seed = body.get("seed", seed_of(f"id {line['custom_id']}", run_seed))
    return answer(body["messages"], seed, SamplingParams(max_new_tokens=body.get("max_tokens"), **params))


def assert_all_answered(target: Path, asked: Iterable[dict[str, Any]], run_seed: int = 0) -> None:
    """Each line exactly once, with the text that an undisturbed run gives it."""
    answers = read(target)
    assert max(Counter(line["custom_id"] for line in answers).values(), default=1) == 1
    assert {line["custom_id"]: text_of(line) for line in answers} == {
        line["custom_id"]: expected(line, run_seed) for line in asked
    }
