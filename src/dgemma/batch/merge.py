"""The files of a run's shards made one."""

from __future__ import annotations

import io
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import tables
from .answer import refused
from .append import MEMBER
from .codecs import codec_of, compressor, need_codec, open_lines
from .files import Lock, replacing, write_json
from .form import Form, duplicate
from .ledger import read_state
from .paths import Paths, beside
from .sets import Lines
from .settings import BatchSettings


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge came to.

    Fields:
        done, failed: lines in the two files; lines: both.
        duplicates: answers that were dropped because another shard answered an earlier line of the same `custom_id`;
            they are among `failed`.
    """

    target: Path
    errors: Path | None
    parts: int
    lines: int
    done: int
    failed: int
    duplicates: int


class _Part:
    """One shard's files, and what its state says of them.

    Raises:
        ConfigError: a file is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.realpath(path))
        stem = beside(self.path)
        self.errors = Path(f"{stem}.errors.jsonl")
        if not self.path.is_file():
            raise ConfigError(f"{path}: no such file")
        state = read_state(Path(f"{stem}.state.json"))
        if state is None:
            raise ConfigError(
                f"{path}: {stem}.state.json is missing; without it nobody knows whether the shard is whole"
            )
        self.state, self.asked = state, state["asked"]
        need_codec(codec_of(self.path), str(path))
        if tables.is_table(self.path):
            tables.need(str(path))

    def answers(self, names: list[str]) -> Iterator[Mapping[str, Any]]:
        """What tells the answers apart."""
        if tables.is_table(self.path):
            there = [name for name in names if name in tables.columns(self.path)]
            yield from tables.rows(self.path, there)
        else:
            for line in _lines(self.path):
                yield _object(self.path, line)

    def failures(self) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
        """The lines of the errors file."""
        if self.errors.exists():
            for line in _lines(self.errors):
                yield line, _object(self.errors, line)


def merge(target: str | Path, parts: Sequence[str | Path], *, restart: bool = False) -> Merged:
    """Writes the answers of all shards of a run to one file and their failed lines to another, as the run without
    shards would have done. It takes 16 MB a million lines.

    Args:
        target: a file like the parts: JSON lines, compressed by name, or Parquet.
        parts: the targets of all shards, in any order, each with its `.state.json` and `.errors.jsonl` beside it.
        restart: whether a target that is there is written anew.

    Raises:
        ConfigError: a shard is missing or not finished, parts are of different runs, or the target is there.
        OSError: the target cannot be written.
    """
    shards = [_Part(part) for part in parts]
    _check(shards)
    paths = Paths.of(BatchSettings(source="-", target=target))
    assert paths.target is not None and paths.errors is not None and paths.state is not None
    paths.check(None)
    asked = {**shards[0].asked, "shard": None}
    table = tables.is_table(paths.target)
    if table != tables.is_table(shards[0].path):
        raise ConfigError(f"{target}: needs to be of the parts' kind, {'JSON lines' if table else 'Parquet'}")
    if any(beside(paths.target) == beside(shard.path) for shard in shards):
        raise ConfigError(f"{target}: is one of the parts, or named like one; name another file")
    need_codec(codec_of(paths.target), str(target))
    lock = Lock(paths.locks[0], paths.target)
    try:
        if not restart:
            paths.check_new()
        return _merge(shards, paths.target, paths.errors, paths.state, asked)
    finally:
        lock.release()


def _merge(shards: list[_Part], target: Path, errors: Path, state: Path, asked: dict[str, Any]) -> Merged:
    form = Form(format=asked["format"], run=asked["run"], model=asked["model"], column_prefix=asked["column_prefix"])
    names = ["custom_id", form.answer_columns[0]]
    late = _latecomers(shards, form, names)
    seen, dropped = Lines(), []

    def keep(answer: Mapping[str, Any]) -> bool:
        line = _line(form, answer)
        if not seen.add(line):
            return False
        if line in late:
            dropped.append((line, str(answer["custom_id"])))
            return False
        return True

    if tables.is_table(target):
        tables.merge([shard.path for shard in shards], target, keep, names)
    else:
        lines = (line for shard in shards for line in _lines(shard.path))
        _write(target, (line for line in lines if keep(_object(target, line))))
    done = len(seen) - len(dropped)

    def failures() -> Iterator[bytes]:
        for shard in shards:
            yield from (line for line, failure in shard.failures() if seen.add(failure["line"]))
        yield from (refused(form, duplicate(*one)).data for one in dropped)

    total = sum(shard.state["done"] + shard.state["failed"] for shard in shards)
    if total > done:
        _write(errors, failures())
    else:
        errors.unlink(missing_ok=True)
    counts = {"lines": total, "done": done, "failed": total - done}
    # The command without --shard finds its work done.
    write_json(state, {**shards[0].state, "asked": asked, **counts, "refused": 0, "finished": True})
    return Merged(
        target=target,
        errors=errors if total > done else None,
        parts=len(shards),
        duplicates=len(dropped),
        **counts,
    )


def _check(shards: list[_Part]) -> None:
    """Refuses what is not all of one run."""
    first = shards[0]
    numbers: dict[int, Path] = {}
    count = 0
    for shard in shards:
        if shard.asked["run"] != first.asked["run"]:
            raise ConfigError(f"{shard.path}: is of another run than {first.path}: another input, or other settings")
        if not shard.asked.get("shard"):
            raise ConfigError(f"{shard.path}: is no shard; it was written without --shard")
        number, count = map(int, shard.asked["shard"].split("/"))
        if count != int(first.asked["shard"].split("/")[1]):
            raise ConfigError(f"{shard.path}: is one of {count} shards, {first.path} one of another number")
        if number in numbers:
            raise ConfigError(f"{shard.path}: is shard {number}/{count}, and so is {numbers[number]}")
        numbers[number] = shard.path
        if not shard.state.get("finished"):
            raise ConfigError(f"{shard.path}: is not finished; run its command again")
        if shard.state["failed"] and not shard.errors.exists():
            raise ConfigError(f"{shard.path}: {shard.errors} with its failed lines is missing")
        if tables.is_table(shard.path) != tables.is_table(first.path):
            raise ConfigError(f"{shard.path}: is of another kind than {first.path}")
    missing = [str(number) for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise ConfigError(f"PART: {len(missing)} of {count} shards missing: {', '.join(missing)}")


def _latecomers(shards: list[_Part], form: Form, names: list[str]) -> set[int]:
    """Answered lines whose `custom_id` an earlier line has."""
    import numpy as np

    hashes, lines, answered = array("Q"), array("q"), Lines()

    def take(line: int, custom_id: Any) -> None:
        if custom_id is not None:
            hashes.append(hash(str(custom_id)) & 0xFFFF_FFFF_FFFF_FFFF)
            lines.append(line)

    for shard in shards:
        count = 0
        for answer in shard.answers(names):
            line = _line(form, answer)
            count += 1
            answered.add(line)
            take(line, answer.get("custom_id"))
        if count != shard.state["done"]:
            raise ConfigError(f"{shard.path}: has {count} answers, and had {shard.state['done']} when it was finished")
        for _, failure in shard.failures():
            take(failure["line"], failure["custom_id"])
    keys, numbers = np.frombuffer(hashes, np.uint64), np.frombuffer(lines, np.int64)
    order = np.lexsort((numbers, keys))
    keys, numbers = keys[order], numbers[order]
    later = np.flatnonzero((keys[1:] == keys[:-1]) & (numbers[1:] != numbers[:-1])) + 1
    return {line for line in numbers[later].tolist() if line in answered}


def _line(form: Form, answer: Mapping[str, Any]) -> int:
    line = form.line_of(answer)
    if line is None:
        raise ConfigError(f"PART: holds an answer that is not from this run: {str(answer)[:100]}")
    return line


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        reader: Any = open_lines(file, codec_of(path), str(path))
        yield from reader


def _object(path: Path, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a line that is no JSON object: {line[:80]!r}")
    return value


def _write(path: Path, lines: Iterator[bytes]) -> None:
    compress = compressor(codec_of(path))
    with replacing(path) as temporary, temporary.open("wb") as file:
        buffer = io.BytesIO()
        for line in lines:
            buffer.write(line)
            if buffer.tell() >= MEMBER:
                file.write(compress(buffer.getvalue()))
                buffer = io.BytesIO()
        if buffer.tell():
            file.write(compress(buffer.getvalue()))
