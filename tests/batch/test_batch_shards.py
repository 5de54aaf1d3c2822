"""Shards of a run, made one again: what the run without shards would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import dump, read, request, write

from dgemma.batch import BatchSettings, merge, run
from dgemma.errors import ConfigError


def shards(folder: Path, count: int, suffix: str = "jsonl", **more: Any) -> list[Path]:
    """All shards of `in.…`, run."""
    parts = []
    source = next(folder.glob("in.*"))
    for number in range(1, count + 1):
        part = folder / f"part.{number}.{suffix}"
        run(BatchSettings(source=source, target=part, shard=(number, count), **more), FakeModel())
        parts.append(part)
    return parts


def essence(line: dict[str, Any]) -> str:
    """A line without what differs from answer to answer: names and times."""
    body = (line.get("response") or {}).get("body") or {}
    own = {key: value for key, value in body.items() if key not in ("id", "created")}
    return json.dumps({**line, "response": {**(line.get("response") or {}), "body": own}}, sort_keys=True)


lists = st.lists(st.sampled_from(["a", "b", "c", "bad a", "rubbish", "new", "new", "new", "late a", ""]), max_size=30)


def lines_of(kinds: list[str]) -> list[bytes]:
    """Lines that repeat a custom_id, lines that are refused at once and under way."""
    lines = []
    for number, kind in enumerate(kinds, 1):
        if kind == "rubbish":
            lines.append(b"{")
        elif kind == "":
            lines.append(b"")
        elif kind == "new":
            lines.append(dump(request(number)))
        elif kind == "bad a":
            lines.append(dump(request(number, custom_id="a", temperature=-1)))
        else:
            content = "NAN" if kind.startswith("late") else None
            lines.append(dump(request(number, content, custom_id=kind[-1])))
    return lines


@settings(max_examples=25, deadline=None)
@given(kinds=lists, count=st.integers(1, 4))
def test_shards_merged_are_the_whole_run(
    kinds: list[str], count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "in.jsonl", lines_of(kinds))
    whole = run(BatchSettings(source=folder / "in.jsonl", target=folder / "whole.jsonl"), FakeModel())
    merged = merge(folder / "out.jsonl", list(reversed(shards(folder, count))))
    assert (merged.done, merged.failed, merged.lines) == (whole.done, whole.failed, whole.total)
    for name in ("jsonl", "errors.jsonl"):
        one, other = (sorted(map(essence, read(folder / f"{stem}.{name}"))) for stem in ("whole", "out"))
        assert len(one) == len(other)
        if name == "jsonl":
            assert one == other
    lines = [sorted(line["line"] for line in read(folder / f"{stem}.errors.jsonl")) for stem in ("whole", "out")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_each_line_is_in_one_shard(tmp_path: Path, suffix: str) -> None:
    rows = [{"custom_id": f"r{n % 90}", "prompt": f"p{n}" if n % 20 else ""} for n in range(100)]
    write(tmp_path / "in.jsonl", rows)
    parts = shards(tmp_path, 7, suffix)
    for number, part in enumerate(parts, 1):
        got = pq.read_table(part).to_pylist() if suffix == "parquet" else read(part)
        assert {line["input_line"] % 7 for line in got} == {number % 7}
    merged = merge(tmp_path / f"out.{suffix}", parts)
    out = tmp_path / f"out.{suffix}"
    got = pq.read_table(out).to_pylist() if suffix == "parquet" else read(out)
    assert sorted(line["input_line"] for line in got) == [n + 1 for n in range(90) if n % 20]
    assert (merged.done, merged.failed) == (85, 15)
    codes = {line["line"]: line["error"]["code"] for line in read(tmp_path / "out.errors.jsonl")}
    assert sorted(codes) == sorted([n + 1 for n in range(0, 100, 20)] + list(range(91, 101)))
    assert sum(code == "duplicate_custom_id" for code in codes.values()) == 10
    # The command without shards has nothing left to do.
    source, target = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    again = run(BatchSettings(source=source, target=target), lambda: pytest.fail("it is done"))
    assert again.total == 100


def test_what_is_not_all_of_one_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(10)])
    parts = shards(tmp_path, 3)
    other = tmp_path / "other.jsonl"
    run(
        BatchSettings(source=tmp_path / "in.jsonl", target=other, shard=(2, 3), system=None, any_model=True),
        FakeModel(),
    )
    plain = tmp_path / "plain.jsonl"
    run(BatchSettings(source=tmp_path / "in.jsonl", target=plain), FakeModel())
    two = tmp_path / "two.jsonl"
    run(BatchSettings(source=tmp_path / "in.jsonl", target=two, shard=(2, 2)), FakeModel())
    out = tmp_path / "out.jsonl"
    for wrong, why in [
        (parts[:2], r"1 of 3 shards missing: 3"),
        ([parts[0], other, parts[2]], "is of another run"),
        ([*parts, parts[1]], r"is shard 2/3, and so is"),
        ([plain], "is no shard"),
        ([parts[0], two], "is one of 2 shards"),
        ([tmp_path / "none.jsonl"], "no such file"),
        ([tmp_path / "in.jsonl"], r"in.state.json is missing"),
    ]:
        with pytest.raises(ConfigError, match=why):
            merge(out, wrong)
    with pytest.raises(ConfigError, match="one of the parts"):
        merge(parts[0], parts)
    with pytest.raises(ConfigError, match="of the parts' kind"):
        merge(tmp_path / "out.parquet", parts)
    state = tmp_path / "part.2.state.json"
    whole = state.read_text()
    state.write_text(json.dumps({**json.loads(whole), "finished": False}))
    with pytest.raises(ConfigError, match="is not finished"):
        merge(out, parts)
    state.write_text(whole)
    lines = parts[1].read_bytes().splitlines(keepends=True)
    parts[1].write_bytes(b"".join(lines[1:]))
    with pytest.raises(ConfigError, match="has 2 answers, and had 3"):
        merge(out, parts)
    parts[1].write_bytes(b"".join(lines))
    assert not out.exists() and not (tmp_path / "out.lock").exists()
    assert merge(out, parts).done == 10
    with pytest.raises(ConfigError, match="is there already"):
        (tmp_path / "out.state.json").unlink()
        merge(out, parts)
    assert merge(out, parts, restart=True).done == 10
