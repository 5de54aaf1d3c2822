"""Rows, templates, tables, compressed files and streams in and out."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fakes import FakeModel, answer
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import assert_all_answered, dump, expected, read, request, seed_of, text_of, write

from dgemma.batch import BatchSettings, Summary, run
from dgemma.batch.template import Template
from dgemma.errors import ConfigError
from dgemma.params import SamplingParams

COLUMNS = ["input_line", "generated_text", "finish_reason", "prompt_tokens", "completion_tokens", "seed"]


def start(source: Path | str, target: Path | str, model: Any = None, /, **settings: Any) -> Summary:
    return run(BatchSettings(source=source, target=target, **settings), FakeModel() if model is None else model)


def said(prompt: str, line: int, **more: Any) -> str:
    """What the fake model says to a row's prompt."""
    messages = [{"role": "user", "content": prompt}]
    if "system" in more:
        messages.insert(0, {"role": "system", "content": more.pop("system")})
    return answer(messages, seed_of(more.pop("key", f"line {line}")), SamplingParams(**more))


@pytest.mark.parametrize("column", ["prompt", "question", "text"])
def test_rows_keep_their_columns_and_get_the_answers(tmp_path: Path, column: str) -> None:
    rows = [{column: f"p{n}", "id": n % 2, "more": {"a": [n, None, "é"]}} for n in range(20)]
    write(tmp_path / "in.jsonl", [*rows[:5], "", *rows[5:], {"id": 3}, {column: " "}, {column: None}])
    summary = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (summary.done, summary.failed) == (20, 3)
    lines = {line["input_line"]: line for line in read(tmp_path / "out.jsonl")}
    for place, row in enumerate(rows):
        number = place + 1 + (place >= 5)
        assert list(lines[number]) == [*row, *COLUMNS]
        assert {name: lines[number][name] for name in row} == row
        assert lines[number]["generated_text"] == said(row[column], number)
        assert (lines[number]["finish_reason"], lines[number]["completion_tokens"]) == ("stop", 5)
        assert lines[number]["seed"] == seed_of(f"line {number}")
    failures = read(tmp_path / "out.errors.jsonl")
    assert {line["line"]: line["error"]["message"] for line in failures} == {
        22: f"{column}: no such column in this row",
        23: "prompt: is empty",
        24: f"{column}: is null",
    }


def test_rows_with_messages_a_system_message_and_an_id(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "ho"}]
    last = {"role": "user", "content": "again"}
    rows = [{"messages": [*talk, last], "custom_id": "a"}, {"messages": "no list"}, {"messages": [{"role": "king"}]}]
    write(tmp_path / "in.jsonl", [*rows, {"messages": [last], "custom_id": 7}, {"messages": [last], "custom_id": "7"}])
    summary = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", system="Be brief.")
    assert (summary.done, summary.failed) == (3, 2)
    lines = {line["input_line"]: line for line in read(tmp_path / "out.jsonl")}
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, talk[1], last]
    assert lines[1]["generated_text"] == answer(prompt, seed_of("id a"), SamplingParams())
    assert lines[2]["generated_text"] == said("no list", 2, system="Be brief.")
    assert lines[4]["generated_text"] == said("again", 4, system="Be brief.", key="id 7")
    assert lines[4]["custom_id"] == 7
    assert [line["line"] for line in read(tmp_path / "out.errors.jsonl")] == [3, 5]


def test_raw_thinking_and_a_prefix(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "Once", "seed": 3}, {"prompt": [1, 2, 3]}, {"prompt": ["a", "b"]}])
    with pytest.raises(ConfigError, match=r"^column_prefix: .* has a column 'seed'"):
        start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", raw=True)
    start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", raw=True, column_prefix="x_")
    lines = {line["x_input_line"]: line for line in read(tmp_path / "out.jsonl")}
    assert lines[1]["x_generated_text"] == answer("Once", seed_of("line 1"), SamplingParams())
    assert lines[2]["x_generated_text"] == answer([1, 2, 3], seed_of("line 2"), SamplingParams())
    assert [line["line"] for line in read(tmp_path / "out.errors.jsonl")] == [3]
    # The output of one run is the input of another.
    start(
        tmp_path / "out.jsonl", tmp_path / "two.jsonl", prompt_column="x_generated_text", think=True, column_prefix="y_"
    )
    second = {line["y_input_line"]: line for line in read(tmp_path / "two.jsonl")}
    assert second[1].keys() >= {"prompt", "x_generated_text", "y_generated_text", "y_thoughts"}


def test_templates(tmp_path: Path) -> None:
    rows = [{"q": "a {b}", "n": n, "more": {"k": [True, None]}} for n in range(3)]
    write(tmp_path / "in.jsonl", [*rows, {"q": "x", "n": None, "more": 1}, {"q": "x", "more": 1}])
    start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", template="{{{q}}} is {n}, {more}\n")
    lines = {line["input_line"]: line for line in read(tmp_path / "out.jsonl")}
    for n in range(3):
        prompt = f'{{a {{b}}}} is {n}, {{"k": [true, null]}}\n'
        assert lines[n + 1]["generated_text"] == said(prompt, n + 1)
    assert len(read(tmp_path / "out.errors.jsonl")) == 2
    for template in ("{q} {nothing}", "{n}{ q}"):
        with pytest.raises(ConfigError, match=r"^template: .* has no column .* \(it has: q, n, more\)"):
            start(tmp_path / "in.jsonl", tmp_path / "b.jsonl", template=template)


@settings(max_examples=50)
@given(parts=st.lists(st.tuples(st.text(), st.text(alphabet=st.characters(exclude_characters="{}"), min_size=1))))
def test_templates_are_pythons_own_where_columns_are_names(parts: list[tuple[str, str]]) -> None:
    """Text and columns in turn, braces doubled: what stands for itself comes out as it was."""
    text = "".join(f"{before.replace('{', '{{').replace('}', '}}')}{{{name}}}" for before, name in parts)
    if not parts:
        return
    row = {name: f"<{name}>" for _, name in parts}
    assert Template(text).fill(row) == "".join(f"{before}<{name}>" for before, name in parts)


@pytest.mark.parametrize("text", ["{", "}", "a {b", "a b}", "{}", "no column", "{{a}}", "{a} {"])
def test_templates_without_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^template: "):
        Template(text)


DETECTED = {
    "openai": ([request(1)], "openai"),
    "openai after rubbish": (["{", "[]", "{}", request(1)], "openai"),
    "a custom_id is not enough": ([{"custom_id": "a", "prompt": "p"}], "rows"),
    "a url is not enough": ([{"url": "https://example.org", "text": "p"}], "rows"),
    "rows after rubbish": (["nonsense", {}, {"text": "p"}], "rows"),
    "an openai line that lacks its body": ([{"custom_id": "a", "method": "POST"}, request(1)], "openai"),
}


@pytest.mark.parametrize("name", DETECTED)
def test_what_an_input_is(tmp_path: Path, name: str) -> None:
    lines, kind = DETECTED[name]
    write(tmp_path / "in.jsonl", lines)
    start(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.state.json").read_text())["asked"]["format"] == kind
    assert len(read(tmp_path / "out.jsonl")) == 1


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "template for openai": ("in.jsonl", {"template": "{a}", "format": "openai"}, "template: is for rows"),
    "system for openai": ("in.jsonl", {"system": "s", "format": "openai"}, "system: is for rows"),
    "no prompt column": ("rows.jsonl", {"format": "rows"}, "prompt_column: .*has no column .*it has: a, b"),
    "another column": ("rows.jsonl", {"prompt_column": "c"}, "prompt_column: .*no column 'c'"),
    "a folder": ("", {}, ": is a directory"),
    "nothing": ("nothing.jsonl", {}, "nothing.jsonl: cannot be read"),
    "no parquet": ("no.parquet", {}, "no.parquet: cannot be read as Parquet"),
    "broken gzip": ("bad.jsonl.gz", {}, "compressed data are damaged"),
    "cut zstd": ("cut.jsonl.zst", {}, "compressed data are damaged"),
    "openai into a table": ("in.jsonl", {"format": "openai", "target": "out.parquet"}, "JSON lines, not Parquet"),
    "onto itself": ("in.jsonl", {"target": "in.jsonl", "restart": True}, "is the input itself"),
    "errors onto answers": ("in.jsonl", {"errors": "out.jsonl"}, "for answers and for errors"),
    "into no folder": ("in.jsonl", {"target": "no/out.jsonl"}, "no is not a directory"),
    "into a folder": ("in.jsonl", {"target": "."}, "is no regular file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    write(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}])
    (tmp_path / "no.parquet").write_bytes(b"nonsense")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"nonsense")
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(os.urandom(9000))[:4000])
    source, own, message = WRONG[name]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    named = {key: tmp_path / value if key in ("target", "errors") else value for key, value in own.items()}
    files = {"source": tmp_path / source, "target": tmp_path / "out.jsonl"}
    with pytest.raises(ConfigError, match=message):
        run(BatchSettings(**{**files, **named}), FakeModel())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_compressed_files_in_and_out(tmp_path: Path, suffix: str) -> None:
    asked = [request(n) for n in range(300)]
    raw = b"".join(dump(line) + b"\r\n" for line in asked)
    halves = [b"\xef\xbb\xbf" + raw[:5000], raw[5000:]]  # two members
    compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
    (tmp_path / f"in.{suffix}").write_bytes(b"".join(map(compress, halves)))
    start(tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}")
    assert_all_answered(tmp_path / f"out.{suffix}", asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"in.{suffix}", f"out.{suffix}", "out.state.json"]
    )


def test_lines_without_end_are_refused_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.batch.source.MAX_LINE", 1000)
    long = dump(request(2, "x" * 5000))
    asked = [request(1, "x" * 700), request(3)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([dump(asked[0]), long, dump(asked[1]), long]))
    start(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert_all_answered(tmp_path / "out.jsonl", asked)
    failures = read(tmp_path / "out.errors.jsonl")
    assert [(line["line"], line["error"]["code"]) for line in failures] == [(2, "line_too_long"), (4, "line_too_long")]


def table() -> pa.Table:
    """Types that JSON does not have, among them."""
    count = 50
    return pa.table(
        {
            "question": pa.array([None if n == 7 else f"what is {n}?" for n in range(count)]),
            "when": pa.array([datetime.datetime(2026, 1, 1 + n % 28) for n in range(count)], pa.timestamp("us")),
            "price": pa.array([decimal.Decimal(n) / 4 for n in range(count)], pa.decimal128(8, 2)),
            "blob": pa.array([bytes([n, 255]) for n in range(count)], pa.binary()),
            "score": pa.array([float("nan") if n % 2 else n / 3 for n in range(count)], pa.float32()),
            "tags": pa.array([["a", None] * (n % 3) for n in range(count)]),
            "nested": pa.array([{"x": n, "y": {"z": [n]}} for n in range(count)]),
        }
    )


def test_parquet_in_and_out_keeps_columns_types_and_order(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "in.parquet", row_group_size=16)
    summary = start(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (summary.done, summary.failed) == (49, 1)
    made, own = pq.read_table(tmp_path / "out.parquet"), table()
    kept = own.take([n for n in range(50) if n != 7])
    assert made.column_names == [*own.column_names, *COLUMNS]
    for name in own.column_names:
        assert made.schema.field(name).type == own.schema.field(name).type
        assert repr(made[name].to_pylist()) == repr(kept[name].to_pylist())  # NaN is not itself
    numbers = made["input_line"].to_pylist()
    assert numbers == [n + 1 for n in range(50) if n != 7]
    texts = [said(f"what is {number - 1}?", number) for number in numbers]
    assert made["generated_text"].to_pylist() == texts
    assert [line["line"] for line in read(tmp_path / "out.errors.jsonl")] == [8]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.parquet",
        "out.errors.jsonl",
        "out.parquet",
        "out.state.json",
    ]
    again = start(tmp_path / "in.parquet", tmp_path / "out.parquet", lambda: pytest.fail("done already"))
    assert again.resumed == 50


def test_parquet_in_and_lines_out(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "in.parquet")
    start(tmp_path / "in.parquet", tmp_path / "out.jsonl", template="{question} {nested}")
    line = next(line for line in read(tmp_path / "out.jsonl") if line["input_line"] == 2)
    assert line["generated_text"] == said('what is 1? {"x": 1, "y": {"z": [1]}}', 2)
    assert (line["when"], line["price"], line["blob"]) == ("2026-01-02T00:00:00", "0.25", "Af8=")
    assert (line["score"], line["tags"], line["nested"]) == (None, ["a", None], {"x": 1, "y": {"z": [1]}})


def test_lines_in_and_parquet_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{n}", "n": n if n % 2 else n / 2, "mixed": n if n % 3 else "x", "o": {"a": n}, "empty": {}}
        for n in range(40)
    ]
    write(tmp_path / "in.jsonl", [*rows, {"prompt": "late", "new": [1]}, {"prompt": "n", "nothing": None}])
    start(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    made = pq.read_table(tmp_path / "out.parquet")
    assert made["input_line"].to_pylist() == list(range(1, 43))
    assert made["n"].to_pylist() == [*(row["n"] for row in rows), None, None]
    assert made["mixed"].to_pylist() == [*(json.dumps(row["mixed"]) for row in rows), None, None]
    assert made["o"].to_pylist() == [*(row["o"] for row in rows), None, None]
    assert made["empty"].to_pylist()[:2] == ["{}", "{}"]
    assert made["new"].to_pylist()[-2:] == [[1], None]
    assert made["generated_text"][41].as_py() == said("n", 42)


def test_a_table_is_made_of_what_a_killed_start_left(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "in.parquet")
    stop = threading.Event()
    model = FakeModel(delay=0.05, max_batch=4)
    asked = BatchSettings(source=tmp_path / "in.parquet", target=tmp_path / "out.parquet")
    run(asked, model, lambda progress: stop.set() if progress.done > 3 else None, stop=stop)
    assert not (tmp_path / "out.parquet").exists() and read(tmp_path / "out.part.jsonl")
    summary = start(asked.source, asked.target)
    assert summary.resumed >= 4 and pq.read_table(tmp_path / "out.parquet").num_rows == 49


class Stdio:
    """stdin and stdout of a command, for one that reads and writes bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: bytes):
        self.out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.out, write_through=True))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def test_stdin_and_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(n) for n in range(50)]
    data = b"\n".join([*map(dump, asked), b"{", dump(request(3))])
    with monkeypatch.context() as own:
        stdio = Stdio(own, data)
        summary = start("-", "-")
        lines = stdio.lines()
    assert (summary.done, summary.failed, summary.target) == (50, 2, None)
    good = {line["custom_id"]: text_of(line) for line in lines if "line" not in line}
    assert good == {line["custom_id"]: expected(line) for line in asked}
    assert sorted(line["line"] for line in lines if "line" in line) == [51, 52]
    with monkeypatch.context() as own:
        stdio = Stdio(own, data)
        start("-", "-", errors=tmp_path / "bad.jsonl")
        assert len(stdio.lines()) == 50 and len(read(tmp_path / "bad.jsonl")) == 2


def test_stdin_is_resumed_where_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(n) for n in range(60)]
    lines = [*map(dump, asked), b"{"]
    stop, model = threading.Event(), FakeModel(delay=0.05)
    Stdio(monkeypatch, b"\n".join(lines))
    run(
        BatchSettings(source="-", target=tmp_path / "out.jsonl"),
        model,
        lambda progress: stop.set() if progress.done else None,
        stop=stop,
    )
    Stdio(monkeypatch, b"\n".join(reversed(lines)))
    with pytest.raises(ConfigError, match=r"stdin: line \d+ is not the one"):
        start("-", tmp_path / "out.jsonl")
    Stdio(monkeypatch, b"\n".join(lines))
    again = FakeModel()
    summary = start("-", tmp_path / "out.jsonl", again)
    assert 0 < len(again.asked) < 60 and (summary.done, summary.failed) == (60, 1)
    assert_all_answered(tmp_path / "out.jsonl", asked)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_that_is_done_is_done_only_for_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    rows = [{"prompt": f"p{n}"} for n in range(9)]
    target = tmp_path / f"out.{suffix}"
    Stdio(monkeypatch, b"\n".join(map(dump, rows)))
    assert start("-", target).done == 9
    Stdio(monkeypatch, b"\n".join(map(dump, rows)) + b"\n")
    assert start("-", target, lambda: pytest.fail("it is done")).resumed == 9
    for other in (rows[:-1], [*rows, {"prompt": "more"}], [*rows[:-1], {"prompt": "p9"}]):
        Stdio(monkeypatch, b"\n".join(map(dump, other)))
        with pytest.raises(ConfigError, match="another content of the input"):
            start("-", target)


def test_rows_of_a_stream_are_told_apart_without_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{n}", "x": [n, 1.5]} for n in range(60)]
    stop = threading.Event()
    Stdio(monkeypatch, b"\n".join(map(dump, rows)))
    first = BatchSettings(source="-", target=tmp_path / "out.jsonl")
    run(first, FakeModel(delay=0.05), lambda progress: stop.set() if progress.done else None, stop=stop)
    Stdio(monkeypatch, b"\n".join(dump({**row, "x": 0}) for row in rows))
    with pytest.raises(ConfigError, match=r"stdin: line \d+ is not the one"):
        start("-", tmp_path / "out.jsonl")
    Stdio(monkeypatch, b"\n".join(map(dump, rows)))
    assert start("-", tmp_path / "out.jsonl").done == 60


def test_no_model_for_a_stream_without_a_good_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stdio(monkeypatch, b"{\n[]\n" * 3000)
    assert start("-", tmp_path / "out.jsonl", lambda: pytest.fail("nothing to answer")).failed == 6000


def test_a_pipe_gets_its_answer_before_it_says_more(tmp_path: Path) -> None:
    """Whoever waits for each answer before the next request is not kept waiting."""
    os.mkfifo(tmp_path / "in")
    out, got = tmp_path / "out.jsonl", []

    def talk() -> None:
        with (tmp_path / "in").open("wb", buffering=0) as pipe:
            for number in range(3):
                pipe.write(dump(request(number)) + b"\n")
                for _ in range(500):
                    if out.exists() and len(out.read_bytes().splitlines()) > number:
                        got.append(number)
                        break
                    threading.Event().wait(0.01)

    talker = threading.Thread(target=talk)
    talker.start()
    start(tmp_path / "in", out)
    talker.join()
    assert got == [0, 1, 2]
