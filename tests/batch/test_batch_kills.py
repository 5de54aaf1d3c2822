"""kill -9 at random moments, the same command again each time: nothing is lost, nothing is there twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lines import assert_all_answered, read, request, write

FAKE = str(Path(__file__).with_name("fakes.py"))
SOURCE = str(Path(__file__).parents[2] / "src")
KILLS = 3


def begin(folder: Path, *flags: str, **more: str) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_", "FAKE_"))}
    command = [sys.executable, FAKE, "batch", str(folder / "in.jsonl"), *flags]
    environment = {**kept, "PYTHONPATH": SOURCE, "FAKE_DELAY": "0.02", "DGEMMA_WORKERS": "1", **more}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def wait_for(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    """Until the file has grown to so many bytes, or the process has ended."""
    while process.poll() is None and not (path.exists() and path.stat().st_size >= size):
        time.sleep(0.005)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_kill_9(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    asked = [request(n) for n in range(400)]
    write(tmp_path / "in.jsonl", [*asked[:200], "{", *asked[200:], request(1)])
    target = tmp_path / f"out.{suffix}"
    for _ in range(KILLS):
        process = begin(tmp_path, str(target), "--quiet")
        if suffix == "jsonl":
            wait_for(target, (target.stat().st_size if target.exists() else 0) + rng.randrange(1, 30_000), process)
        else:
            wait_for(tmp_path / "out.state.json", 1, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
    process = begin(tmp_path, str(target))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_all_answered(target, asked)
    assert sorted(line["line"] for line in read(tmp_path / "out.errors.jsonl")) == [201, 402]
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl", "out.state.json", "out.errors.jsonl", target.name
    }  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: int, code: int) -> None:
    asked = [request(n) for n in range(400)]
    write(tmp_path / "in.jsonl", asked)
    process = begin(tmp_path, str(tmp_path / "out.jsonl"))
    wait_for(tmp_path / "out.jsonl", 5000, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    done = len(read(tmp_path / "out.jsonl"))
    assert 0 < done < 400
    last = said.decode().splitlines()[-1]
    assert last.startswith("stopped: ") and last.endswith("lines are done; the same command goes on from there")
    assert not (tmp_path / "out.lock").exists()
    process = begin(tmp_path, str(tmp_path / "out.jsonl"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{done} of them before this start" in said.decode()
    assert_all_answered(tmp_path / "out.jsonl", asked)


def test_a_reader_who_leaves_ends_it_quietly(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(400)])
    process = begin(tmp_path, "-", "--quiet")
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr is not None and process.stderr.read() == b"" and process.returncode == 0
