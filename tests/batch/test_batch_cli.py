"""`dgemma batch` as people type it: its flags, its words, its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakes import FakeModel, answer
from lines import assert_all_answered, dump, read, request, seed_of, write

import dgemma
from dgemma.batch import Progress
from dgemma.cli import app
from dgemma.cli.batch_view import View, words_of
from dgemma.params import SamplingParams

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """`invoke("in.jsonl", "out.jsonl", …)` in a folder of its own; `loaded` on it is what `dgemma.load` was told."""
    loaded: dict[str, Any] = {}

    def load(name: str, **settings: Any) -> FakeModel:
        loaded.update({"name": name, **settings})
        return FakeModel()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DGEMMA_WORKERS", "1")
    monkeypatch.setitem(vars(dgemma), "load", load)

    def run(*arguments: str, input: bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["batch", *arguments], input=input)

    run.loaded = loaded  # type: ignore[attr-defined]
    return run


def test_it_answers_and_says_so(invoke: Invoke, tmp_path: Path) -> None:
    asked = [request(n) for n in range(30)]
    write(tmp_path / "in.jsonl", [*asked, "{"])
    done = invoke("in.jsonl", "out.jsonl", "--price-per-hour", "3600", "--max-batch", "5")
    assert (done.exit_code, done.stdout) == (0, "")
    assert_all_answered(tmp_path / "out.jsonl", asked)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"30 of 31 lines answered · 1 failed ({tmp_path / 'out.errors.jsonl'}) · ")
    assert "tokens/s · 2.5 tokens/forward · cost 0." in last
    assert invoke.loaded["engine"].max_batch == 5  # type: ignore[attr-defined]
    again = invoke("in.jsonl", "out.jsonl")
    assert again.exit_code == 0 and "31 of them before this start" in again.stderr


def test_json_and_quiet(invoke: Invoke, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    done = invoke("in.jsonl", "out.jsonl", "--json", "--quiet", "--price-per-hour", "1")
    figures = json.loads(done.stdout)
    assert done.stderr == "" and figures["done"] == 1 and figures["target"] == str(tmp_path / "out.jsonl")
    assert {"tokens_per_second", "tokens_per_forward", "cost", "failed", "resumed", "errors"} <= figures.keys()


def test_flags_reach_the_requests(invoke: Invoke, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"word": "fox"}])
    (tmp_path / "few shots.txt").write_text("a -> b\n{word} ->\n")
    flags = ("--template", "@few shots.txt", "--max-new-tokens", "7", "--seed", "3", "--temperature", "0.5")
    assert invoke("in.jsonl", "out.jsonl", *flags, "--system", "Short.").exit_code == 0
    (line,) = read(tmp_path / "out.jsonl")
    prompt = [{"role": "system", "content": "Short."}, {"role": "user", "content": "a -> b\nfox ->"}]
    params = SamplingParams(max_new_tokens=7, temperature=0.5)
    assert line["generated_text"] == answer(prompt, seed_of("line 1", 3), params)


def test_stdin_to_stdout(invoke: Invoke) -> None:
    done = invoke("-", "-", input=b"\n".join([dump(request(1)), b"{"]))
    assert done.exit_code == 0
    assert sorted(json.loads(line).get("line", 0) for line in done.stdout.splitlines()) == [0, 2]


def test_a_file_to_stdout(invoke: Invoke, tmp_path: Path) -> None:
    """The same with a file as input; nothing else is left behind."""
    write(tmp_path / "in.jsonl", [request(n) for n in range(3)])
    done = invoke("in.jsonl", "-")
    assert done.exit_code == 0, done.stderr
    assert sorted(json.loads(line)["custom_id"] for line in done.stdout.splitlines()) == ["r0", "r1", "r2"]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_shards_and_merge(invoke: Invoke, tmp_path: Path) -> None:
    asked = [request(n) for n in range(10)]
    write(tmp_path / "in.jsonl", asked)
    for number in (1, 2):
        assert invoke("in.jsonl", f"part.{number}.jsonl", "--shard", f"{number}/2").exit_code == 0
    done = invoke("--merge", "out.jsonl", "part.2.jsonl", "part.1.jsonl", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 10 and "10 answers of 2 shards" in done.stderr
    assert_all_answered(tmp_path / "out.jsonl", asked)


BAD = {
    "nothing": ([], "IN: missing"),
    "no OUT": (["in.jsonl"], "OUT: missing"),
    "too many": (["in.jsonl", "out.jsonl", "more"], "'more'"),
    "no such IN": (["none.jsonl", "out.jsonl"], "none.jsonl: cannot be read"),
    "empty IN": (["", "out.jsonl"], "IN: '' names no file"),
    "no such folder": (["in.jsonl", "no/out.jsonl"], "is not a directory"),
    "OUT is IN": (["in.jsonl", "in.jsonl"], "is the input itself"),
    "OUT is there": (["in.jsonl", "rows.jsonl"], "rows.jsonl: is there already"),
    "shard no fraction": (["in.jsonl", "out.jsonl", "--shard", "2"], "--shard"),
    "shard 0": (["in.jsonl", "out.jsonl", "--shard", "0/4"], "--shard: 0/4 is not I/N with I from 1 to N"),
    "shard beyond": (["in.jsonl", "out.jsonl", "--shard", "5/4"], "--shard"),
    "bad format": (["in.jsonl", "out.jsonl", "--format", "csv"], "--format"),
    "bad seed": (["in.jsonl", "out.jsonl", "--seed", str(2**64)], "--seed"),
    "bad temperature": (["in.jsonl", "out.jsonl", "--temperature", "-1"], "--temperature"),
    "bad canvas": (["in.jsonl", "out.jsonl", "--canvas-length", "999"], "--canvas-length: 999 is above"),
    "too many stops": (["in.jsonl", "out.jsonl", *["--stop", "x"] * 5], "--stop"),
    "bad price": (["in.jsonl", "out.jsonl", "--price-per-hour", "-1"], "--price-per-hour"),
    "empty model": (["in.jsonl", "out.jsonl", "--model", " "], "--model"),
    "template for requests": (["in.jsonl", "out.jsonl", "--template", "{a}", "--format", "openai"], "--template"),
    "template without sense": (["rows.jsonl", "out.jsonl", "--template", "{a"], "--template: a lone {"),
    "template's column": (["rows.jsonl", "out.jsonl", "--template", "{c}"], "--template: rows.jsonl has no column 'c'"),
    "template's file": (["rows.jsonl", "out.jsonl", "--template", "@none"], "--template: none cannot be read"),
    "template and column": (["rows.jsonl", "out.jsonl", "--template", "{a}", "--prompt-column", "a"], "--template"),
    "column": (["rows.jsonl", "out.jsonl", "--prompt-column", "c"], "--prompt-column: rows.jsonl has no column 'c'"),
    "no column": (["rows.jsonl", "out.jsonl", "--think"], "--prompt-column"),
    "raw and system": (["rows.jsonl", "out.jsonl", "--raw", "--system", "x"], "--system"),
    "taken column": (["seeds.jsonl", "out.jsonl"], "--column-prefix"),
    "empty system": (["rows.jsonl", "out.jsonl", "--system", " "], "--system"),
    "errors to stdout": (["in.jsonl", "out.jsonl", "--errors", "-"], "--errors"),
    "json beside stdout": (["in.jsonl", "-", "--json"], "--json"),
    "merge of nothing": (["--merge", "out.jsonl"], "--merge"),
    "merge with more": (["--merge", "out.jsonl", "a", "--seed", "3"], "--seed: says nothing beside --merge"),
    "merge of what isn't there": (["--merge", "out.jsonl", "a"], "a: no such file"),
    "unknown flag": (["in.jsonl", "out.jsonl", "--sharp"], "--shard"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_one_line_and_exit_code_2(invoke: Invoke, tmp_path: Path, name: str) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    write(tmp_path / "rows.jsonl", [{"a": 1}])
    write(tmp_path / "seeds.jsonl", [{"prompt": 1, "seed": 1}])
    before = {path.name for path in tmp_path.iterdir()}
    arguments, named = BAD[name]
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and named in last
    assert all(line == last or line.startswith(("loading", "running")) for line in done.stderr.splitlines())
    assert not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").stat().st_size == 0
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left <= {"out.jsonl", "out.state.json"}


def test_another_start_with_other_flags_names_the_flag(invoke: Invoke, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(1)])
    assert invoke("in.jsonl", "out.jsonl", "--max-new-tokens", "4").exit_code == 0
    done = invoke("in.jsonl", "out.jsonl", "--max-new-tokens", "5")
    assert done.exit_code == 2
    assert "--max-new-tokens:" in done.stderr and "was begun with 4, not 5; --restart begins anew" in done.stderr
    assert invoke("in.jsonl", "out.jsonl", "--max-new-tokens", "5", "--restart").exit_code == 0


def test_a_full_disk_is_exit_code_1_and_says_what_to_do(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("in.jsonl"), [request(1)])
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if b"batch_req" in bytes(data):
            raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr("dgemma.batch.append.os.write", full)
    done = invoke("in.jsonl", "out.jsonl", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "out.jsonl: No space left on device; what is written is whole, and the same command goes on from there\n"
    )


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def progress(**own: Any) -> Progress:
    figures: dict[str, Any] = {
        "stage": "running", "lines": 2000, "total": 2000, "done": 500, "failed": 3, "resumed": 0, "fresh": 503,
        "tokens": 9000, "prompt_tokens": 9, "forwards": 1000, "seconds": 12.0, "running_seconds": 10.0,
    }  # fmt: skip
    return Progress(**{**figures, **own})


def test_the_bar_shows_the_figures_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with View(36.0, quiet=False) as view:
        view(progress())
        view._bar.refresh()
    shown = terminal.getvalue()
    for words in (
        "running",
        "500 of 2,000 done",
        "3 failed",
        "900 tokens/s",
        "9.0 tokens/forward",
        "30 s left",
        "0.12",
    ):
        assert words in shown
    assert shown.rstrip("\n").endswith("\x1b[2K")  # the last thing it does is to take itself away


def test_lines_in_a_log_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("dgemma.cli.batch_view.time.monotonic", lambda: now[0])
    with View(None, quiet=False) as view:
        for second in range(100):
            now[0] = float(second)
            view(progress(done=second, stage="running" if second else "loading"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0].startswith("loading: ") and "61 of 2,000 done" in lines[3]
    assert words_of(progress(stage="checking", done=0), None) == ["2,000 lines", "3 failed"]


@pytest.mark.parametrize("price", ["nan", "inf"])
def test_a_price_that_is_none(invoke: Invoke, tmp_path: Path, price: str) -> None:
    write(tmp_path / "in.jsonl", [request(0)])
    done = invoke("in.jsonl", "out.jsonl", "--price-per-hour", price)
    assert (done.exit_code, done.stderr) == (2, f"error: --price-per-hour: {price} is no price\n")


def test_another_kind_of_file_beside_a_state(invoke: Invoke, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"prompt": ["hello"]}), tmp_path / "in.parquet")
    assert invoke("in.parquet", "out.jsonl").exit_code == 0
    done = invoke("in.parquet", "out.parquet")
    assert done.exit_code == 2 and "wrote another kind of file; name another one, or --restart" in done.stderr
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_a_stdout_that_is_closed(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(0)])
    command = f"exec {sys.executable} {Path(__file__).parent / 'fakes.py'} batch in.jsonl - >&-"
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), str(Path(__file__).parent)])
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"error: stdout: there is none to write to\n")
