"""`summarize`: a directory's figures, from config.json alone or with the headers of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_fixtures import Checkpoint, refused, release_dict

from dgemma import memory
from dgemma.checkpoint import summarize, summary
from dgemma.errors import ConfigError


def test_the_release_from_its_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(json.dumps(release_dict()))
    monkeypatch.setattr(summary, "machine_memory", lambda: 32 * 2**30)
    found = summarize(tmp_path)
    assert (found.total, found.active) == (25_250_986_812, 3_840_375_612)
    assert sum(found.parameters.values()) == found.total
    assert (found.files, found.tensors, found.stored, found.stored_bytes) == (0, 0, {}, 0)
    memory = {entry.name: entry for entry in found.memory}
    assert memory["bfloat16"].weights == 2 * found.total
    assert memory["float32"].weights == 4 * found.total
    # 5 full layers keep 8192 tokens of 2 heads of 512, 25 sliding ones 1024 tokens of 8 heads of 256; keys and values
    cache = 2 * (5 * 8192 * 2 * 512 + 25 * 1024 * 8 * 256)
    assert memory["bfloat16"].cache == memory["int4"].cache == 2 * cache
    assert memory["float32"].cache == 4 * cache
    assert 12.6e9 < memory["int4"].weights < 15e9 < 25.2e9 < memory["int8"].weights < 27.5e9
    assert {name: entry.fits for name, entry in memory.items()} == {
        "float32": False,
        "bfloat16": False,
        "fp8": True,
        "int8": True,
        "int4": True,
    }
    assert found.scheme is None
    assert summarize(tmp_path, context=512).memory[1].cache == 4 * 512 * (5 * 2 * 512 + 25 * 8 * 256)


def test_weights_are_counted_from_their_headers(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path)
    bytes_of_text = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    checkpoint.tensors["model.encoder.vision_tower.x"] = torch.zeros(7, 3, dtype=torch.bfloat16)
    checkpoint.write_shards(3)
    found = summarize(tmp_path)
    assert found.stored == {"F32": bytes_of_text, "BF16": 42}
    assert found.stored_bytes == bytes_of_text + 42
    assert (found.files, found.tensors, found.vision_tensors) == (3, len(checkpoint.tensors), 1)
    assert found.parameters["vision"] == 21
    assert found.total * 4 == bytes_of_text


def test_damaged_directories(tmp_path: Path):
    refused(lambda: summarize(tmp_path), str(tmp_path / "config.json"), kind=ConfigError)
    checkpoint = Checkpoint(tmp_path).write()
    checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:-1])
    refused(lambda: summarize(tmp_path), "truncated", str(checkpoint.file))


def test_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    found = memory.machine_memory()
    assert found is None or 2**26 < found < 2**50
    monkeypatch.delattr(memory.os, "sysconf", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory.machine_memory() is None
    monkeypatch.setattr(sys, "platform", "win32")
    if not hasattr(memory.ctypes, "windll"):  # without Windows' library: unknown, no crash
        assert memory.machine_memory() is None


def test_summary_needs_no_torch(tmp_path: Path):
    Checkpoint(tmp_path).write()
    code = (
        "import sys; from pathlib import Path; from dgemma.checkpoint import summarize, resolve, VisionIgnored; "
        "resolve(sys.argv[1]); print(summarize(Path(sys.argv[1])).total); "
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
