"""Packed copies: a plain load's weights, bit for bit, mapped and shared; or a plain load and a word why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from few_bits import FileLimit, look, odd_widths
from packed_copies import is_mapped, left_in, mapping, packed_of, same, words

import dgemma
from dgemma.batch import BatchSettings
from dgemma.batch import run as run_batch
from dgemma.checkpoint import kept, load_network, resolve
from dgemma.checkpoint.hub import copy_path
from dgemma.checkpoint.keeper import Keeper
from dgemma.checkpoint.kept import PackedCopyUnused
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.cli.app import app
from dgemma.config import ModelConfig
from dgemma.devices import check_keep_packed
from dgemma.errors import CapacityError, ConfigError
from dgemma.kernels.cpu import Packed
from dgemma.quant import Policy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
POLICIES = {
    "int4": Policy(format="int4"),
    "int8": Policy(format="int8"),
    "mixed": Policy(format="int4", kinds={"attention": "int8", "embedding": "keep", "router": "int8"}),
    "odd": Policy(format="int4", group="row"),
    "fp8": Policy(format="fp8"),
}
CHILD = """
import sys, warnings
from pathlib import Path
import torch
from dgemma.checkpoint import VisionIgnored, keeper, load_network
from dgemma.config import ModelConfig
warnings.simplefilter("ignore", VisionIgnored)
directory = Path(sys.argv[1])
def load(**options):
    config = ModelConfig.read(directory / "config.json")
    return load_network(directory, config, dtype=torch.float32, **options)
"""


def child(directory: Path, code: str) -> subprocess.Popen[str]:
    """Another process; it can load what is in a directory, and has the words of its stdin."""
    command = [sys.executable, "-c", CHILD + code, str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", POLICIES)
def test_a_mapped_network_is_the_one_that_was_read(
    form: str, dtype: torch.dtype, source: Path, load: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight and what comes of them, though none of the model's own tensors is read; nor is a name or number of
    the copy's invented: the safetensors library reads it too."""
    origin = odd_widths(source, tmp_path / "odd-float") if form == "odd" else source
    directory = quantize_checkpoint(origin, tmp_path / form, POLICIES[form]).destination
    wanted = load(directory, dtype=dtype)
    assert left_in(cache) == []
    kept_one, path = load(directory, dtype=dtype, keep_packed=True), copy_path(directory)
    assert same(kept_one, wanted) and not is_mapped(kept_one, path) and left_in(cache) == [path.name]
    monkeypatch.setattr("dgemma.checkpoint.load.read_tensor", None)
    monkeypatch.setattr("dgemma.checkpoint.load.take_inventory", None)
    found = load(directory, dtype=dtype)
    assert same(found, wanted) and is_mapped(found, path) and mapping(path)["rights"] == "r--s"
    assert found.dtype == dtype and torch.equal(look(found), look(wanted))
    starts = {tensor.data_ptr() % 64 for tensor in [*packed_of(found), *found.parameters()] if tensor.nbytes >= 64}
    assert starts == {0}
    from safetensors.torch import load_file

    table = load_file(path)["layers.1.experts.down_proj.data"]
    assert torch.equal(table, wanted.layers[1].experts.down_proj.data)
    before = path.stat()
    assert same(load(directory, dtype=dtype, keep_packed=True), wanted)  # there is one: it is mapped, not made anew
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_its_answers(tmp_path: Path) -> None:
    """`dgemma generate` with and without a copy, and what `dgemma info` says of it."""

    warnings.simplefilter("default", PackedCopyUnused)

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
        return result

    quantized = tmp_path / "small"
    run("quantize", "demo", quantized, "--format", "int4", "--no-search")
    ask = ("generate", "Sort these letters: b a d", "--seed", 1, "--no-watch", "--device", "cpu", "--model", quantized)
    assert "packed copy none; --keep-packed makes one" in run("info", quantized).stdout
    assert json.loads(run("info", quantized, "--json").stdout)["packed_copy"] is None
    plain, path = run(*ask), copy_path(quantized)
    assert run(*ask, "--keep-packed").stdout == plain.stdout and path.is_file()
    mapped = run(*ask)
    assert (mapped.stdout, mapped.stderr) == (plain.stdout, plain.stderr) and plain.stdout.strip()
    told = {"path": str(path), "bytes": path.stat().st_size, "problem": None}
    assert json.loads(run("info", quantized, "--json").stdout)["packed_copy"] == told
    assert re.search(rf"^packed copy \S+ MiB, {re.escape(str(path))}$", run("info", quantized).stdout, re.MULTILINE)
    os.utime(quantized / "model.safetensors", (1, 1))
    assert "not used: it is of what the model's files were before" in run("info", quantized).stdout
    stale = run(*ask)
    assert stale.stdout == plain.stdout and stale.stderr.startswith("warning: ") and str(path) in stale.stderr


def test_two_processes_share_the_pages(model: Path, load: Any) -> None:
    """Every page of the file is in both, and is neither's own."""
    load(model, keep_packed=True)
    path = copy_path(model)
    code = "network = load()\nprint('ready', flush=True)\nsys.stdin.read()"
    one, other = child(model, code), child(model, code)
    try:
        assert [process.stdout.readline() for process in (one, other)] == ["ready\n"] * 2  # type: ignore[union-attr]
        for process in (one, other):
            found = mapping(path, process.pid)
            pages = -(-path.stat().st_size // 4096) * 4
            assert int(found["Rss"]) == int(found["Shared_Clean"]) == pages
            assert found["Private_Dirty"] == found["Anonymous"] == "0" and int(found["Pss"]) <= pages // 2
    finally:
        for process in (one, other):
            process.communicate()


def load_and_tell(directory: Path, told: Path) -> Any:
    """What a worker calls: a file of its own says whether it maps the copy."""
    model = dgemma.load(directory, device="cpu", threads=1)
    (told / f"{os.getpid()}").write_text(str(is_mapped(model.network, copy_path(directory))))
    return model


def test_workers_of_a_batch_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them maps what there is."""
    monkeypatch.setattr(sys.modules["dgemma.batch.run"], "WORTH", 1)  # a request for each process
    small, told = quantize_checkpoint(resolve("demo"), tmp_path / "small", POLICIES["int4"]).destination, tmp_path / "x"
    dgemma.load(small, device="cpu", keep_packed=True)
    told.mkdir()
    (tmp_path / "in.jsonl").write_text('{"prompt": "Sort these letters: b a"}\n' * 2)
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    done = run_batch(settings, lambda: [partial(load_and_tell, small, told)] * 2, lambda _: None)
    assert done.done == 2 and [path.read_text() for path in told.iterdir()] == ["True", "True"]


def test_nobody_can_write_into_it(model: Path, load: Any) -> None:
    """The system ends a process that tries; the file is what it was."""
    load(model, keep_packed=True)
    content = copy_path(model).read_bytes()
    process = child(model, "load().layers[0].experts.down_proj.data.zero_()")
    process.communicate()
    assert process.returncode == -signal.SIGSEGV
    assert copy_path(model).read_bytes() == content


def test_killed_while_it_was_written(model: Path, load: Any, cache: Path) -> None:
    """What is left is not used; the next start removes it, whatever it was asked for."""
    for options in ({}, {"keep_packed": True}):
        code = "keeper.frame = lambda *_: __import__('os').kill(__import__('os').getpid(), 9)\nload(keep_packed=True)"
        process = child(model, code)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        (left,) = left_in(cache)
        assert left.endswith(".tmp") and (cache / left).stat().st_size > 50_000
        network = load(model, **options)
        assert left_in(cache) == ([copy_path(model).name] if options else [])
    assert same(load(model), network)


def test_a_start_waits_for_one_that_writes(model: Path, load: Any) -> None:
    """Of two processes that are to keep a copy one writes it and the other maps it; one that is not told to keep any
    waits for nobody."""
    network = load(model)
    path, got = copy_path(model), []
    with Keeper(model, torch.float32) as keeper:
        other = threading.Thread(target=lambda: got.append(load(model, keep_packed=True)))
        other.start()
        other.join(0.3)
        assert other.is_alive() and same(load(model), network)
        keeper.begin(network.state_dict().keys() | network.quantized().keys(), 0, 0)
        for name, weight in {**network.state_dict(), **network.quantized()}.items():
            keeper.add(name, weight)
        keeper.finish()
    made = path.stat().st_ino
    other.join(10)
    assert is_mapped(got[0], path) and same(got[0], network) and path.stat().st_ino == made
    with Keeper(model, torch.float32):  # one that comes to nothing: whoever waits makes it
        other = threading.Thread(target=lambda: got.append(load(model, keep_packed=True)))
        path.unlink()
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join(10)
    assert same(got[1], network) and path.is_file()


@pytest.mark.parametrize("case", ["no room", "full", "full at the end", "not a folder", "read-only", "no home"])
def test_a_disk_that_takes_nothing(
    case: str, model: Path, load: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded all the same, one line says why nothing is kept, and nothing is left."""
    wanted, why = load(model), "No space left|File too large"
    limit: Any = FileLimit(1 << 40)
    if case == "no room":
        free = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("dgemma.checkpoint.keeper.shutil.disk_usage", lambda _: free)
        why = r"it takes 0\.\d MB, the disk has 0\.0 MB free"
    elif case == "full":
        limit = FileLimit(40_000)
    elif case == "full at the end":
        load(model, keep_packed=True)
        limit = FileLimit(copy_path(model).stat().st_size - 1)
        copy_path(model).unlink()
    elif case == "not a folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DGEMMA_CACHE", str(tmp_path / "file"))
        why = "File exists|Not a directory"
    elif case == "read-only":  # which root would not notice

        def refused(*_: object) -> None:
            raise PermissionError(30, "Read-only file system")

        monkeypatch.setattr("dgemma.checkpoint.keeper.os.open", refused)
        why = "Read-only file system"
    else:
        monkeypatch.delenv("DGEMMA_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        monkeypatch.chdir(tmp_path)
        why = "nobody's home directory"
    with limit, words() as said:
        found = load(model, keep_packed=True)
    (text,) = said
    assert re.search(rf"no packed copy is kept \(({why})", text) and "\n" not in text and same(found, wanted)
    assert left_in(cache) == [] and not (tmp_path / "~").exists()


def test_without_the_compiled_kernels(model: Path, load: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept, which one line says; one that is there is left alone."""
    wanted = load(model)
    monkeypatch.setattr("dgemma.kernels.native.library", lambda: None)
    with words() as said:
        plain = load(model, keep_packed=True)
    assert len(said) == 1 and "the compiled kernels are missing" in said[0] and left_in(cache) == []
    monkeypatch.undo()
    monkeypatch.setenv("DGEMMA_CACHE", str(cache))
    load(model, keep_packed=True)
    monkeypatch.setattr("dgemma.kernels.native.library", lambda: None)
    again = load(model)
    assert not any(isinstance(weight, Packed) for net in (plain, again) for weight in net.quantized().values())
    monkeypatch.undo()
    assert torch.equal(look(again), look(wanted))


def test_where_none_is_used(model: Path, source: Path, load: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of floats has none, nor have GPUs and networks in parts; what is made floating-point is read."""
    with pytest.raises(ConfigError, match="keep_packed: no weight of the model is in few bits"):
        load(source, keep_packed=True)
    assert left_in(cache) == []
    for device, ranks in (("cuda", 1), ("cpu", 2)):
        with pytest.raises(ConfigError, match=r"keep_packed: .* whole network on a CPU"):
            check_keep_packed(True, torch.device(device), ranks)
    with pytest.raises(ConfigError, match="keep_packed"):
        dgemma.load(model, device="cpu", tensor_parallel=2, keep_packed=True)
    load(model, keep_packed=True)
    monkeypatch.setattr("dgemma.checkpoint.load.at_hand", None)
    assert not load(model, dequantize=True).quantized()
    meta = load_network(model, ModelConfig.read(model / "config.json"), device="meta", dtype=torch.float32)
    assert meta.device.type == "meta"


def test_a_copy_that_memory_cannot_hold(model: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, as a plain load is: each step would read all of it from the disk."""
    network = load(model, keep_packed=True)
    held = sum(weight.nbytes for weight in network.quantized().values())
    held += sum(tensor.nbytes for tensor in network.state_dict().values())
    monkeypatch.setattr(kept, "machine_memory", lambda: held)
    load(model)
    monkeypatch.setattr(kept, "machine_memory", lambda: held - 1)
    monkeypatch.setattr(kept, "_populate", None)
    with pytest.raises(CapacityError) as caught:
        load(model)
    assert str(copy_path(model)) in str(caught.value)
