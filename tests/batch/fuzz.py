"""Malformed and valid lines mixed, and whether every one of them is accounted for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lines import dump, expected, read, request, text_of, write

RUBBISH = [
    b"\xff",
    b"\0",
    b"{",
    b"}",
    b'"',
    b"\\",
    b",",
    b"[",
    b"null",
    b"1e999",
    b"\xed\xa0\x80",
    b"\x1b[31m",
    b" ",
    b":",
]


def broken(rng: random.Random, line: dict[str, Any]) -> bytes:
    """A line that is no request, or not one that can be honoured."""
    raw = dump(line)
    body = line["body"]
    ways: list[Callable[[], bytes]] = [
        lambda: raw[: rng.randrange(1, len(raw))],
        lambda: raw + b"}",
        lambda: b"".join(rng.choices(RUBBISH, k=rng.randrange(1, 9))) + b"!",
        lambda: raw.replace(b"say", b"\xff"),
        lambda: dump(
            {**line, rng.choice(["custom_id", "method", "url", "body"]): rng.choice([None, 3, [], {}, "", True])}
        ),
        lambda: dump({key: value for key, value in line.items() if key != rng.choice(list(line))} | {"x": 1}),
        lambda: dump({**line, "body": {**body, rng.choice(["stream", "logprob", "temperature", "messages"]): "yes"}}),
        lambda: dump({**line, "body": {**body, "model": "other"}}),
        lambda: dump({**line, "body": {**body, "messages": [{"role": rng.choice(["user", "x"]), "content": 3}]}}),
        lambda: dump({**line, "body": {**body, "n": rng.choice([0, -1, 1.5, 10**30])}}),
        lambda: dump({**line, "body": {**body, "messages": [{"role": "user", "content": "TOOLONG"}]}}),
        lambda: dump({**line, "body": {**body, "messages": [{"role": "user", "content": "NAN"}]}}),
        lambda: rng.choice([b"[" * 5000, b"9" * 5000, b'{"a":' * 300, b"NaN", b"true", b'"text"', b"[]", b"{}"]),
    ]
    return rng.choice(ways)().replace(b"\n", b" ")


def mixed(path: Path, count: int) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Writes so many lines; returns the good requests and the numbers of the bad lines. The rest is blank."""
    rng = random.Random(count)
    good: dict[int, dict[str, Any]] = {}
    bad: set[int] = set()
    lines: list[bytes] = []
    for number in range(1, count + 1):
        kind = rng.random()
        if kind < 0.02:
            lines.append(rng.choice([b"", b"  ", b"\t", b"\r"]))
        elif kind < 0.5:
            good[number] = request(number, max_tokens=rng.choice([None, 1, 9]), n=rng.choice([None, 1, 2]))
            lines.append(dump(good[number]))
        elif kind < 0.52 and good:
            bad.add(number)
            lines.append(dump({**request(number), "custom_id": rng.choice(list(good.values()))["custom_id"]}))
        else:
            bad.add(number)
            lines.append(broken(rng, request(number)))
    write(path, lines)
    return good, bad


def assert_accounted_for(target: Path, errors: Path, good: dict[int, dict[str, Any]], bad: set[int]) -> None:
    """Every good request has its own answer, every bad line one reason, and nothing else is there."""
    answers, failures = read(target), read(errors)
    assert sorted(line["line"] for line in failures) == sorted(bad)
    assert sorted(int(line["id"][-12:]) for line in answers) == sorted(good)
    for line in answers:
        asked = good[int(line["id"][-12:])]
        assert line["custom_id"] == asked["custom_id"] and text_of(line) == expected(asked)
    for line in failures:
        assert line["error"] or line["response"]["status_code"] != 200
        assert "\x1b" not in json.dumps(line, ensure_ascii=False)
