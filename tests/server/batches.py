"""Requests, uploads and batches by the official client, for the tests of `/v1/files` and `/v1/batches`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
from servers import until

import dgemma

FAKES = str(Path(__file__).parents[1] / "batch" / "fakes.py")
SOURCE = str(Path(dgemma.__file__).parents[1])
CHAT, ENDED = "/v1/chat/completions", ("completed", "failed", "cancelled", "expired")
SHORT = {"max_tokens": 6, "diffusion": {"max_denoising_steps": 2}}
LONG = {"max_tokens": 800, "diffusion": {"min_tokens": 800, "max_denoising_steps": 2}}


def line(number: int, content: str = "hello", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """One request."""
    own: dict[str, Any] = {"model": "tiny", **SHORT, **body}
    own |= {CHAT: {"messages": [{"role": "user", "content": content}]}, "/v1/completions": {"prompt": content}}.get(
        url, {"input": content}
    )
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": own}


def upload(client: openai.OpenAI, lines: list[Any], **more: Any) -> Any:
    """A file of them; texts are lines as they are."""
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch", **more)


def create(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Any:
    """A batch of them."""
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    """The batch when it is over."""

    def look() -> Any:
        now = client.batches.retrieve(batch.id)
        assert now.request_counts.completed + now.request_counts.failed <= max(1, now.request_counts.total)
        return now if now.status in ENDED else None

    return until(look)


def content(client: openai.OpenAI, name: str | None) -> dict[str, Any]:
    """The lines of an output, by `custom_id`."""
    if name is None:
        return {}
    lines = [json.loads(one) for one in client.files.content(name).text.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


def said(one: dict[str, Any]) -> str:
    """What a line of an output says."""
    assert one["response"]["status_code"] == 200 and one["error"] is None
    return one["response"]["body"]["choices"][0]["message"]["content"]
