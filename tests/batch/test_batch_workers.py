"""Several processes that answer: all lines once, whoever dies, however much is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from lines import assert_all_answered, expected, read, request, text_of, write

from dgemma.batch import BatchSettings, Summary, run
from dgemma.errors import CheckpointError, ConfigError
from dgemma.params import SamplingParams

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def start(folder: Path, loaders: list[Callable[[], Any]], report: Any = lambda progress: None, **more: Any) -> Summary:
    settings = BatchSettings(source=folder / "in.jsonl", target=folder / "out.jsonl", **more)
    return run(settings, lambda: loaders, report)


def children() -> list[int]:
    """Processes that this one has begun and not buried."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def loading_fails() -> FakeModel:
    raise CheckpointError("config.json: missing")


def workers() -> list[int]:
    """Those among them that answer."""
    return [pid for pid in children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_many_answer_every_line_once(tmp_path: Path) -> None:
    asked = [request(n, "NAN" if n == 50 else "CRASH" if n == 60 else None, n=1 + n % 3) for n in range(400)]
    write(tmp_path / "in.jsonl", [*asked, "{"])
    summary = start(tmp_path, [partial(FakeModel, delay=0.01)] * 3)
    assert (summary.done, summary.failed, summary.tokens) == (398, 3, sum(5 * (1 + n % 3) for n in range(400)) - 20)
    texts = {line["custom_id"]: text_of(line) for line in read(tmp_path / "out.jsonl")}
    assert texts == {line["custom_id"]: expected(line) for n, line in enumerate(asked) if n not in (50, 60)}
    codes = {
        line["custom_id"]: line["response"] and line["response"]["body"]["error"]["code"]
        for line in read(tmp_path / "out.errors.jsonl")
    }
    assert codes == {None: None, "r50": "generation_failed", "r60": "internal_error"}
    assert not workers()


def test_few_lines_need_no_processes(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(20)])
    calls: list[int] = []

    def load() -> FakeModel:
        calls.append(os.getpid())
        return FakeModel()

    assert start(tmp_path, [load, load, load]).done == 20
    assert calls == [os.getpid()]


def test_another_takes_the_place_of_one_that_is_killed(tmp_path: Path) -> None:
    asked = [request(n) for n in range(600)]
    write(tmp_path / "in.jsonl", asked)
    killed: list[int] = []

    def report(progress: Any) -> None:
        if not killed and progress.done > 60:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.warns(UserWarning, match=r"worker \d of 2 ended by signal 9; another one begins in its place"):
        summary = start(tmp_path, [partial(FakeModel, delay=0.05)] * 2, report)
    assert (summary.done, summary.failed, len(killed)) == (600, 0, 1)
    assert_all_answered(tmp_path / "out.jsonl", asked)
    assert not workers()


def test_what_a_process_raises_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(200)])
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        start(tmp_path, [FakeModel, loading_fails])
    with pytest.raises(ConfigError, match="canvas_length: 512 is above"):
        start(tmp_path, [FakeModel] * 2, params=SamplingParams(canvas_length=512), restart=True)
    monkeypatch.setenv("FAKE_BROKEN", "1")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start(tmp_path, [FakeModel] * 2, restart=True)
    assert not read(tmp_path / "out.jsonl") and not (tmp_path / "out.errors.jsonl").exists()
    assert not workers()


def test_long_lines_and_long_answers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    asked = [request(n, f"ECHO {n} " + "x" * 400_000) for n in range(80)]
    write(tmp_path / "in.jsonl", asked)
    assert start(tmp_path, [partial(FakeModel, delay=0.02)] * 2).done == 80
    assert_all_answered(tmp_path / "out.jsonl", asked)


def test_they_end_with_whoever_began_them(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(3000)])
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from functools import partial
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from fakes import FakeModel
            from dgemma.batch import BatchSettings, run
            if __name__ == "__main__":
                loaders = [partial(FakeModel, delay=0.1)] * 2
                run(BatchSettings(source="in.jsonl", target="out.jsonl"), lambda: loaders)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=environment, start_new_session=True)
    while process.poll() is None and not read_size(tmp_path / "out.jsonl"):
        time.sleep(0.02)
    assert process.poll() is None
    group = [pid for pid in everybody() if os.getsid(pid) == process.pid]
    assert len(group) >= 3
    process.kill()
    process.wait()
    for _ in range(200):
        if not any(alive(pid) for pid in group):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in group)


def read_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def everybody() -> list[int]:
    """All processes that can still be asked."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            os.getsid(int(path.name))
        except ProcessLookupError:
            continue
        found.append(int(path.name))
    return found


def alive(pid: int) -> bool:
    """Whether it runs; a dead one that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
