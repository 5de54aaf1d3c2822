"""The command as a process: how fast its help is, its exit codes, its pipes and its signals."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_model import STORY

from dgemma.cli.app import COMMANDS

FAKE = str(Path(__file__).with_name("fake_model.py"))
SOURCE = str(Path(__file__).parents[2] / "src")
HELP_SECONDS = 0.3


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_", "FAKE_", "COV_"))}
    return {**kept, "PYTHONPATH": SOURCE, **more}


def run(*arguments: str, data: bytes = b"", **more: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, FAKE, *arguments]
    return subprocess.run(command, input=data, capture_output=True, timeout=60, env=environment(**more))


@pytest.fixture
def start() -> Iterator[object]:
    """Starts the command in the background; what is still there at the end is killed."""
    processes = []

    def begin(*arguments: str, **more: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        command = [sys.executable, FAKE, *arguments]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(**more))
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick(command: str) -> None:
    """Processor time, which is the wall's on a machine that has nothing else to do."""
    arguments = [sys.executable, "-m", "dgemma", *command.split(), "--help"]
    subprocess.run(arguments, capture_output=True, env=environment())  # writes the bytecode
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(arguments, capture_output=True, env=environment())
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and done.stdout.startswith(b"Usage: dgemma")
    assert statistics.median(seconds) < HELP_SECONDS, seconds


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_nothing_heavy_is_imported_for_help(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code = (
        "import sys\nfrom dgemma.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'rich', 'jinja2', 'tokenizers', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_piping_loads_no_terminal_library() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(FAKE).parent)!r})\n"
        "import dgemma, fake_model; dgemma.load = fake_model.load\nfrom dgemma.cli import app\n"
        "try: app(['generate', 'hi'])\nexcept SystemExit: pass\nprint('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), text=True)
    assert done.stdout == STORY + "\nFalse\n", done.stderr


def test_stdout_holds_the_text_and_nothing_else() -> None:
    done = run("generate", "hi", "--stats", "--think", "--watch")
    assert done.returncode == 0
    assert done.stdout.decode() == STORY + "\n"
    assert done.stderr


def test_utf8_whatever_the_locale() -> None:
    done = run("generate", "-", data="WARN 海".encode(), PYTHONIOENCODING="latin-1", PYTHONUTF8="0", LC_ALL="C")
    assert done.stdout.decode("utf-8") == STORY + "\n"
    assert done.stderr == b"warning: the slow path is used\n"


@pytest.mark.parametrize(
    ("arguments", "data", "named"),
    [
        (["generate"], b"\xc3\x28", b"UTF-8"),
        (["generate", os.fsdecode(b"caf\xe9")], b"", b"UTF-8"),
        (["generate"], b"", b"stdin"),
        (["generate", "hi", "--model", "/no/such/model"], b"", b"/no/such/model"),
        (["generate", "hi", "--tempperature", "1"], b"", b"--temperature"),
    ],
)
def test_exit_code_2_and_one_line(arguments: list[str], data: bytes, named: bytes) -> None:
    done = run(*arguments, data=data)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    assert named in done.stderr


def test_exit_code_1_and_one_line() -> None:
    done = run("generate", "BOOM")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)


def test_json_from_stdin() -> None:
    done = run("generate", "--json", data=b"hi\n")
    assert json.loads(done.stdout)["text"] == STORY
    assert done.stderr == b""


def test_text_is_flushed_canvas_by_canvas(start: object) -> None:
    process = start("generate", "hi", FAKE_DELAY="0.15")
    begun = time.monotonic()
    first = os.read(process.stdout.fileno(), 65536)
    early = time.monotonic() - begun
    rest = process.stdout.read()
    assert (first + rest).decode() == STORY + "\n"
    assert time.monotonic() - begun > early + 1  # two canvases of nine steps were still to come


def test_a_closed_pipe_is_quiet(start: object) -> None:
    process = start("generate", "hi", FAKE_DELAY="0.05")
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    process.wait(timeout=30)
    assert process.stderr.read() == b""
    assert process.returncode == 0
    process.stdout = None


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX system")
class TestSignals:
    """Ctrl-C and SIGTERM."""

    def test_ctrl_c_is_130_and_keeps_what_was_written(self, start: object) -> None:
        process = start("generate", "hi", FAKE_DELAY="0.1")
        first = os.read(process.stdout.fileno(), 65536)
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert said == b""
        text = (first + rest).decode()
        assert text.endswith("\n") and STORY.startswith(text[:-1])

    def test_ctrl_c_before_the_first_text(self, start: object) -> None:
        process = start("generate", "hi", "--watch", FAKE_DELAY="0.3")
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=30)
        assert (process.returncode, text) == (130, b"")

    def test_sigterm_leaves_no_half_file(self, start: object, tmp_path: Path) -> None:
        process = start("generate", "hi", "--watch", "--record", str(tmp_path / "a.svg"), FAKE_DELAY="0.2")
        process.stderr.readline()
        process.terminate()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 143
        assert b"Traceback" not in said
        assert list(tmp_path.iterdir()) == []

    def test_ctrl_c_in_a_chat_script_stops_the_answer_only(self, start: object) -> None:
        process = start("chat", FAKE_DELAY="0.1")
        process.stdin.write(b"one\n")
        process.stdin.flush()
        first = os.read(process.stdout.fileno(), 65536)
        process.send_signal(signal.SIGINT)
        assert b"stays in the conversation" in process.stderr.readline()
        rest, _ = process.communicate(b"two\n", timeout=30)
        assert process.returncode == 0
        assert (first + rest).decode().endswith(STORY + "\n")

    def test_ctrl_c_at_the_prompt_of_a_script(self, start: object) -> None:
        process = start("chat", FAKE_TEXT="ECHO")
        process.stdin.write(b"one\n")
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert process.returncode == 130
