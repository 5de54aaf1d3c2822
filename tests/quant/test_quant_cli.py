"""`dgemma quantize` and `dgemma info` as people call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from few_bits import Formats

from dgemma.cli.app import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_copy_and_its_answer(tmp_path: Path) -> None:
    """The demo model in int4: figures on stderr, nothing on stdout; the copy is a model like any other."""
    result = run("quantize", "demo", tmp_path / "x", "--format", "int4")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    rows = {line.split()[0]: line for line in result.stderr.splitlines()}
    assert "pack-quantized 4 groups of 32" in rows["experts"] and "pack-quantized 8 by rows" in rows["embedding"]
    assert rows["experts"].endswith("%") and "router" not in rows
    answer = run("generate", "Sort these letters: b a", "--model", tmp_path / "x", "--seed", "1", "--no-watch")
    assert answer.exit_code == 0 and answer.stdout.strip()
    told = run("info", tmp_path / "x")
    assert "int4 and int8 (compressed-tensors)" in told.stdout and "as stored" in told.stdout
    data = json.loads(run("info", tmp_path / "x", "--json").stdout)
    assert data["quantized"] == "int4 and int8 (compressed-tensors)"
    assert data["memory"]["as stored"]["weights_bytes"] < data["memory"]["int8"]["weights_bytes"]
    assert json.loads(run("info", "demo", "--json").stdout)["quantized"] is None


def test_json_and_choices(source: Path, tmp_path: Path) -> None:
    choices = ["--kind", "experts=int4", "--kind", "router=int8", "--kind", "embedding=keep", "--group", "16"]
    result = run("quantize", source, tmp_path / "x", "--format", "int8", *choices, "--no-search", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    told = json.loads(result.stdout)
    assert told["directory"] == str(tmp_path / "x") and told["group"] == 16
    assert {kind: (row["layout"], row["bits"]) for kind, row in told["kinds"].items()} == {
        "experts": ("pack-quantized", 4),
        "attention": ("int-quantized", 8),
        "mlp": ("int-quantized", 8),
        "router": ("int-quantized", 8),
    }
    assert 0.05 < told["kinds"]["experts"]["relative_error"] < 0.12 > told["kinds"]["router"]["relative_error"] * 5


@pytest.mark.parametrize(("arguments", "said"), [
    ("SRC DST --format int3", "--format"),
    ("SRC DST", "--format: missing"),
    ("SRC --format int4", "DST: missing"),
    ("no/such/directory DST --format int4", "no/such/directory"),
    ("SRC SRC --format int4", "exists; name a directory that does not"),
    ("SRC DST --format int4 --group 128", "--group: layers.0.self_attn.q_proj.weight is 64 wide"),
    ("SRC DST --format int8 --group 64", "--group: only int4 has groups"),
    ("SRC DST --format int4 --kind mlp", "--kind: 'mlp' needs KIND=FORMAT"),
    ("SRC DST --format int4 --kind mlp=int8 --kind mlp=fp8", "--kind: 'mlp=fp8' is given twice"),
    ("SRC DST --format int4 --kind norm=int8", "--kind: 'norm' is unknown"),
    ("SRC DST --format int4 --kind mlp=int3", "--kind: mlp=int3"),
    ("SRC /proc/nowhere/x --format int4", "/proc/nowhere"),
])  # fmt: skip
def test_one_line_for_what_cannot_work(arguments: str, said: str, source: Path, tmp_path: Path) -> None:
    places = {"SRC": str(source), "DST": str(tmp_path / "x")}
    result = run("quantize", *[places.get(word, word) for word in arguments.split()])
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and said in result.stderr, result.stderr
    assert not (tmp_path / "x").exists()


def test_a_model_that_does_not_fit(copies: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma.checkpoint import load

    monkeypatch.setattr(load, "machine_memory", lambda: 1000)
    result = run("generate", "hi", "--raw", "--model", copies("int4"), "--no-watch", "--device", "cpu")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) <= 2  # images are left, says a warning
    assert "its weights need" in result.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['dgemma', 'quantize', '--help']\n"
        "from dgemma.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0 and "KIND=FORMAT" in done.stdout, done.stderr
