"""Bad arguments and bad input: exit code 2, one line on stderr that names the flag or file, nothing on stdout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_model import FakeModel, Invoke

BAD = {
    "unknown command": (["generte"], "generte"),
    "unknown flag": (["generate", "hi", "--sead", "3"], "--seed"),
    "unknown flag far from any": (["generate", "hi", "--zzz"], "--zzz"),
    "unknown flag of the group": (["--verbose"], "--verbose"),
    "dash at the start of the prompt": (["generate", "- one"], "after --"),
    "flag without its value": (["generate", "hi", "--seed"], "--seed"),
    "value for a flag that has none": (["generate", "hi", "--json=yes"], "--json"),
    "two prompts": (["generate", "two", "words"], "words"),
    "empty prompt": (["generate", ""], "PROMPT"),
    "prompt of white space": (["generate", " \t\n "], "PROMPT"),
    "max-new-tokens of 0": (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
    "max-new-tokens below 0": (["generate", "hi", "--max-new-tokens", "-5"], "--max-new-tokens"),
    "max-new-tokens no number": (["generate", "hi", "--max-new-tokens", "many"], "--max-new-tokens"),
    "max-new-tokens not whole": (["generate", "hi", "--max-new-tokens", "1.5"], "--max-new-tokens"),
    "min-tokens below 0": (["generate", "hi", "--min-tokens", "-1"], "--min-tokens"),
    "seed no number": (["generate", "hi", "--seed", "abc"], "--seed"),
    "seed too large": (["generate", "hi", "--seed", str(2**64)], "--seed"),
    "seed too small": (["generate", "hi", "--seed", str(-(2**63) - 1)], "--seed"),
    "temperature below 0": (["generate", "hi", "--temperature", "-0.1"], "--temperature"),
    "temperature nan": (["generate", "hi", "--temperature", "nan"], "--temperature"),
    "temperature inf": (["generate", "hi", "--temperature", "inf"], "--temperature"),
    "temperature no number": (["generate", "hi", "--temperature", "hot"], "--temperature"),
    "max-steps of 0": (["generate", "hi", "--max-steps", "0"], "--max-steps"),
    "max-steps no number": (["generate", "hi", "--max-steps", "x"], "--max-steps"),
    "entropy-bound of 0": (["generate", "hi", "--entropy-bound", "0"], "--entropy-bound"),
    "entropy-bound below 0": (["generate", "hi", "--entropy-bound", "-1"], "--entropy-bound"),
    "entropy-bound nan": (["generate", "hi", "--entropy-bound", "nan"], "--entropy-bound"),
    "canvas-length of 0": (["generate", "hi", "--canvas-length", "0"], "--canvas-length"),
    "unknown preset": (["generate", "hi", "--preset", "turbo"], "--preset"),
    "unknown mode": (["generate", "hi", "--mode", "magic"], "--mode"),
    "unknown dtype": (["generate", "hi", "--dtype", "int3"], "--dtype"),
    "threads of 0": (["generate", "hi", "--threads", "0"], "--threads"),
    "threads without end": (["generate", "hi", "--threads", "1000000"], "--threads"),
    "tensor-parallel of 0": (["generate", "hi", "--tensor-parallel", "0"], "--tensor-parallel"),
    "empty stop": (["generate", "hi", "--stop", ""], "--stop"),
    "empty model": (["generate", "hi", "--model", " "], "--model"),
    "empty system": (["generate", "hi", "--system", ""], "--system"),
    "system beside raw": (["generate", "hi", "--raw", "--system", "x"], "--system"),
    "think beside raw": (["generate", "hi", "--raw", "--think"], "--think"),
    "watch without a canvas": (["generate", "hi", "--mode", "autoregressive", "--watch"], "--watch"),
    "record without a canvas": (["generate", "hi", "--mode", "autoregressive", "--record", "a.svg"], "--record"),
    "record that is no svg": (["generate", "hi", "--record", "film.mp4"], "--record"),
    "record into nowhere": (["generate", "hi", "--record", "no/such/folder/a.svg"], "--record"),
    "chat: bad seed": (["chat", "--seed", "x"], "--seed"),
    "chat: bad temperature": (["chat", "--temperature", "-1"], "--temperature"),
    "chat: argument": (["chat", "hello"], "hello"),
    "chat: watch without a canvas": (["chat", "--mode", "autoregressive", "--watch"], "--watch"),
    "chat: empty system": (["chat", "--system", " "], "--system"),
    "info: no such model": (["info", "./nowhere"], "nowhere"),
    "info: empty": (["info", ""], "MODEL"),
    "info: unknown flag": (["info", "--yaml"], "--yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, invoke: Invoke, model: FakeModel) -> None:
    arguments, named = BAD[case]
    result = invoke(*arguments)
    assert_refused(result, named)
    assert not model.calls


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "stdin"),
        (b" \n\n\t", "stdin"),
        (b"caf\xe9 au lait", "UTF-8"),
        (b"\xff\xfeh\x00i\x00", "UTF-8"),
        (b"one\x00two", "NUL"),
        (b"\xef\xbb\xbf", "stdin"),
    ],
)
@pytest.mark.parametrize("arguments", [("generate",), ("generate", "-")])
def test_bad_stdin(data: bytes, named: str, arguments: tuple[str, ...], invoke: Invoke, model: FakeModel) -> None:
    assert_refused(invoke(*arguments, input=data), named)


def test_prompt_of_broken_bytes(invoke: Invoke, model: FakeModel) -> None:
    assert_refused(invoke("generate", "caf\udce9"), "UTF-8")


@pytest.mark.parametrize("path", ["missing", "file.txt", "empty", "broken", "other"])
def test_bad_model_directories(path: str, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "file.txt").write_text("hello")
    for name, content in {"empty": None, "broken": "{", "other": '{"model_type": "llama"}'}.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
    assert_refused(invoke("info", str(tmp_path / path)), path)


def test_record_over_a_directory(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    (tmp_path / "a.svg").mkdir()
    assert_refused(invoke("generate", "hi", "--record", str(tmp_path / "a.svg")), "--record")


def test_record_into_a_closed_folder(
    tmp_path: Path, invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere, so chmod would not do
    assert_refused(invoke("generate", "hi", "--record", str(tmp_path / "a.svg")), "--record")


def test_library_errors_name_the_flag(invoke: Invoke, model: FakeModel) -> None:
    assert_refused(invoke("generate", "REFUSE"), "--seed: refused")


def test_a_failing_run(invoke: Invoke, model: FakeModel) -> None:
    result = invoke("generate", "BOOM")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "RuntimeError: the network fell over" in result.stderr


def test_traceback_on_request(invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_DEBUG", "1")
    result = invoke("generate", "BOOM")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_control_characters_in_errors_are_shown_and_not_sent(invoke: Invoke) -> None:
    result = invoke("info", "./\x1b[31mred\nline")
    assert_refused(result, "␛[31mred line")


def assert_refused(result: object, named: str) -> None:
    """Exit code 2, one line on stderr with `named` in it, silence on stdout."""
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n") and result.stderr.count("\n") == 1, result.stderr
    assert named in result.stderr
    assert "Usage" not in result.stderr and "Traceback" not in result.stderr
