"""What crashes leave: torn ends, holes, locks, full disks; and the mending of it."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import assert_all_answered, dump, read, request, write

from dgemma.batch import BatchSettings, Summary, run
from dgemma.batch.append import Appender, mend
from dgemma.batch.files import Lock
from dgemma.batch.sets import Keys, Lines
from dgemma.batch.writer import Writer
from dgemma.errors import ConfigError

SUFFIXES = ("jsonl", "jsonl.gz", "jsonl.zst")


def start(folder: Path, model: Any = None, /, **settings: Any) -> Summary:
    own = {"source": folder / "in.jsonl", "target": folder / "out.jsonl", **settings}
    return run(BatchSettings(**own), FakeModel() if model is None else model)


def unfinished(state: Path) -> None:
    """As a start that was killed leaves it."""
    content = json.loads(state.read_text())
    content["finished"] = False
    state.write_text(json.dumps(content))


def test_a_torn_last_line_is_mended_wherever_it_is_torn(tmp_path: Path) -> None:
    asked = [request(n) for n in range(3)]
    write(tmp_path / "in.jsonl", asked)
    start(tmp_path)
    whole = (tmp_path / "out.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last, len(whole) + 1):
        (tmp_path / "torn").write_bytes(whole[:end])
        assert mend(tmp_path / "torn", lambda line: bool(json.loads(line))) == (last < end < len(whole))
        assert (tmp_path / "torn").read_bytes() == (whole if end == len(whole) else whole[:last])
    for end in (last, last + 1, last + 30, len(whole) - 2, len(whole) - 1, len(whole)):
        (tmp_path / "out.jsonl").write_bytes(whole[:end])
        unfinished(tmp_path / "out.state.json")
        model = FakeModel()
        summary = start(tmp_path, model)
        assert len(model.asked) == (end < len(whole))
        assert summary.mended == (last < end < len(whole))
        assert_all_answered(tmp_path / "out.jsonl", asked)
        assert (tmp_path / "out.jsonl").read_bytes().startswith(whole[:last])


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_torn_member_is_mended_wherever_it_is_torn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    contents = [b'{"n": 1}\n{"n": 2}\n', b'{"n": 3}\n']
    for content in contents:
        appender = Appender(path)
        appender.write(content)
        appender.close()
    whole = path.read_bytes()
    first = next(size for size in range(1, len(whole)) if taken(path, whole[:size]) == contents[0])
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        torn = mend(path, lambda line: True)
        assert torn == (first < end < len(whole))
        appender = Appender(path)
        appender.write(b'{"n": 4}\n')
        appender.close()
        assert [line["n"] for line in read(path)] == ([1, 2, 3, 4] if end == len(whole) else [1, 2, 4])


def taken(path: Path, data: bytes) -> bytes:
    """What whole members a beginning of a file holds."""
    path.write_bytes(data)
    lines: list[bytes] = []
    mend(path, lambda line: not lines.append(line))  # type: ignore[func-returns-value]
    return b"".join(lines)


damage = st.lists(
    st.tuples(st.sampled_from(["cut", "zeros", "flip", "twice", "blank"]), st.floats(0, 1), st.integers(1, 300)),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(damage=damage, suffix=st.sampled_from(SUFFIXES))
def test_whatever_damage_is_mended_by_answering_again(
    damage: list[tuple[str, float, int]], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Holes of zeros, flipped bytes, repeated lines: in the end each line is there once, with its own text."""
    folder = tmp_path_factory.mktemp("damaged")
    asked = [request(n) for n in range(8)]
    write(folder / "in.jsonl", asked)
    target = folder / f"out.{suffix}"
    start(folder, target=target)
    data = bytearray(target.read_bytes())
    for kind, where, size in damage:
        place = int(where * len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "zeros":
            data[place : place + size] = bytes(len(data[place : place + size]))
        elif kind == "flip" and place < len(data) and suffix != "jsonl":  # checksums find it
            data[place] ^= 1 << size % 8
        elif suffix == "jsonl":
            line = data.rfind(b"\n", 0, place) + 1
            again = data[line : data.find(b"\n", line) + 1] if kind == "twice" else b"\n"
            data[line:line] = again
    target.write_bytes(data)
    unfinished(folder / "out.state.json")
    start(folder, target=target)
    assert_all_answered(target, asked)
    shutil.rmtree(folder)


def test_the_errors_file_is_mended_too(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["{", request(1), "[]", request(2, "NAN")])
    start(tmp_path)
    errors = tmp_path / "out.errors.jsonl"
    whole = errors.read_bytes()
    for end in range(0, len(whole), 50):
        errors.write_bytes(whole[:end])
        unfinished(tmp_path / "out.state.json")
        assert start(tmp_path).failed == 3
        assert sorted(line["line"] for line in read(errors)) == [1, 3, 4]


def test_two_processes_on_one_output_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(5)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    code = (
        "import sys, time; from pathlib import Path; from dgemma.batch.files import Lock\n"
        f"lock = Lock(Path({str(tmp_path)!r}) / 'out.lock', Path('x')); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    for target in ("out.jsonl", "link.jsonl", "out.jsonl.gz"):
        with pytest.raises(ConfigError, match=f"process {other.pid} on .* is writing it"):
            start(tmp_path, target=tmp_path / target, restart=True)
    other.kill()
    other.wait()
    assert start(tmp_path).done == 5
    assert not (tmp_path / "out.lock").exists()


def test_locks_in_a_race_are_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Files of locks come and go; who opened one that is gone has nothing."""
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(200):
            try:
                lock = Lock(tmp_path / "lock", tmp_path / "out")
            except ConfigError:
                with guard:
                    refused += 1
                continue
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with guard:
                inside -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    Lock(tmp_path / "lock", tmp_path / "out").release()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A folder of 64 KiB, or a limit of the size of files where nothing may be mounted; and a way to make room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_ends_it_whole_and_it_goes_on_with_room(tmp_path: Path, small_disk: Any, suffix: str) -> None:
    folder, make_room = small_disk
    asked = [request(n, "ECHO " + os.urandom(400 if suffix == "jsonl" else 3000).hex()) for n in range(100)]
    source = write(tmp_path / "in.jsonl", asked)
    target = folder / f"out.{suffix}"
    for _ in range(2):
        with pytest.raises(OSError, match=r"No space left|File too large") as caught:
            start(tmp_path, source=source, target=target)
        assert caught.value.filename == str(target)
    assert all(line["error"] is None for line in read(target))  # whole
    make_room()
    summary = start(tmp_path, source=source, target=target)
    assert (summary.done, summary.failed, summary.mended) == (100, 0, 0)
    assert_all_answered(target, asked)


class Slow:
    """A sink on a slow disk."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.synced = 0

    def write(self, lines: bytes) -> None:
        time.sleep(0.001)
        self.lines += lines.splitlines()

    def sync(self) -> None:
        self.synced = len(self.lines)

    def close(self) -> None:
        self.sync()


def test_lines_are_written_behind_in_order_and_synced_now_and_then() -> None:
    one, other = Slow(), Slow()
    writer = Writer([one, other], 0.05)
    for number in range(5000):
        writer.put(other if number % 10 == 0 else one, b"%d\n" % number)
    writer.flush()
    assert one.synced + other.synced == 5000
    writer.put(one, b"last\n")
    for _ in range(100):
        if one.synced == 4501:
            break
        time.sleep(0.02)
    assert one.synced == 4501  # without being asked
    writer.close()
    assert other.lines == [b"%d" % number for number in range(0, 5000, 10)]
    assert one.lines[:-1] == [b"%d" % number for number in range(5000) if number % 10]


def test_what_goes_wrong_behind_is_raised_in_front() -> None:
    class Full(Slow):
        def write(self, lines: bytes) -> None:
            raise OSError(28, "No space left on device", "out")

    writer = Writer([Full()], 1.0)
    with pytest.raises(OSError, match="No space"):
        for _ in range(100_000):
            writer.put(writer._sinks[0], b"x\n")
    for end in (writer.flush, writer.close, writer.check):
        with pytest.raises(OSError, match="No space"):
            end()


def test_sets_of_lines_and_keys_are_sets() -> None:
    rng, lines, keys, true = random.Random(0), Lines(), Keys(), set()
    for _ in range(30_000):
        number = rng.randrange(40_000)
        assert lines.add(number) == keys.add(f"r{number}") == (number not in true)
        true.add(number)
    assert len(lines) == len(keys) == len(true)
    assert list(lines) == sorted(true) and 40_001 not in lines and 10**9 not in lines


def test_keys_take_little_memory() -> None:
    keys = Keys()
    for number in range(200_000):
        keys.add(str(number))
    assert sum(len(table) * 8 for table in keys._tables) <= 24 * 200_000


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_other_tools_read_what_is_written_in_members(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.jsonl.{suffix}"
    appender = Appender(path)
    for number in range(20):
        appender.write(dump({"n": number}) + b"\n")
        appender.sync()
    appender.close()
    assert [line["n"] for line in read(path)] == list(range(20))
    tool = shutil.which({"gz": "gzip", "zst": "zstd"}[suffix])
    if tool:
        plain = subprocess.run([tool, "-dc", str(path)], capture_output=True, check=True).stdout
        assert len(plain.splitlines()) == 20
    if suffix == "gz":
        assert len(gzip.decompress(path.read_bytes()).splitlines()) == 20
