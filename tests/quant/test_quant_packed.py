"""Packed copies: a plain load's weights, bit for bit, mapped and shared; or a plain load and a word why."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from few_bits import FileLimit, Formats, look, odd_widths

import dgemma
from dgemma.checkpoint import kept, load_network
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


@pytest.fixture(autouse=True)
def _nothing_is_said() -> Iterator[None]:
    """A warning that a test does not ask for fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PackedCopyUnused)
        yield


@contextlib.contextmanager
def words() -> Iterator[list[str]]:
    """What is said of packed copies."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if one.category is PackedCopyUnused]


@pytest.fixture
def model(copies: Formats, tmp_path: Path) -> Path:
    """An int4 checkpoint of the test's own."""
    return Path(shutil.copytree(copies("int4"), tmp_path / "model"))


def child(directory: Path, code: str) -> subprocess.Popen[str]:
    """Another process; it can load what is in a directory, and has the words of its stdin."""
    command = [sys.executable, "-c", CHILD + code, str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def mapping(path: Path, process: int | str = "self") -> dict[str, str]:
    """What the system says of a file's mapping in a process: its place, rights and kB by kind; {} if there is none."""
    found: dict[str, str] = {}
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) (....) ", line):
            if found:
                return found
            inside = line.endswith(f" {path}")
            if inside:
                found = {"start": place[1], "stop": place[2], "rights": place[3]}
        elif found:
            name, _, value = line.partition(":")
            found[name] = value.strip().removesuffix(" kB")
    return found


def packed_of(network: Any) -> list[torch.Tensor]:
    return [part for _, weight in sorted(network.quantized().items()) for part in (weight.data, weight.scales)]


def is_mapped(network: Any, path: Path) -> bool:
    """Whether the matrices in few bits are in the file's own pages; all of them, or none."""
    where = mapping(path)
    start, stop = (int(where[end], 16) for end in ("start", "stop")) if where else (0, 0)
    inside = {start <= tensor.data_ptr() < stop for tensor in packed_of(network)}
    assert len(inside) == 1
    return inside.pop()


def same(found: Any, wanted: Any) -> bool:
    """Whether two networks have the same weights, bit for bit, held alike."""
    few, many = found.quantized(), wanted.quantized()
    assert few.keys() == many.keys() and all(isinstance(weight, Packed) for weight in few.values())
    held = all((few[n].bits, few[n].group, few[n].shape) == (many[n].bits, many[n].group, many[n].shape) for n in few)
    plain, others = found.state_dict(), wanted.state_dict()
    assert plain.keys() == others.keys()
    pairs = [*zip(packed_of(found), packed_of(wanted), strict=True), *((plain[name], others[name]) for name in plain)]
    return held and all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


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


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), length


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another header of the same length."""
    header, length = header_of(path)
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text.ljust(length))


def about(**values: str) -> Callable[[Path], None]:
    return lambda path: edited(path, lambda header: header["__metadata__"].update(values))


def few(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(header: dict[str, Any]) -> None:
        held = json.loads(header["__metadata__"]["few"])
        change(held)
        header["__metadata__"]["few"] = json.dumps(held)

    return lambda path: edited(path, apply)


NAME = "layers.0.experts.down_proj"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short by a byte": (lambda p: os.truncate(p, p.stat().st_size - 1), "is damaged"),
    "short by half": (lambda p: os.truncate(p, p.stat().st_size // 2), "is damaged"),
    "empty": (lambda p: os.truncate(p, 0), "is damaged"),
    "too long": (lambda p: os.truncate(p, p.stat().st_size + 1), "is damaged"),
    "no header": (lambda p: p.write_bytes(b"\0" * p.stat().st_size), "is damaged"),
    "no metadata": (lambda p: edited(p, lambda header: header.pop("__metadata__")), "is damaged"),
    "metadata that are none": (lambda p: edited(p, lambda header: header.update(__metadata__=[])), "is damaged"),
    "another format": (about(format="pt"), "is damaged"),
    "another version": (about(layout="0"), "is of another version of dgemma"),
    "another source": (about(source="0" * 32), "is of what the model's files were before"),
    "another dtype": (about(dtype="bfloat16"), "has numbers in bfloat16, not in float32"),
    "no dtype": (about(dtype="wide"), "is damaged"),
    "a count that is none": (about(vision="many"), "is damaged"),
    "no bits": (about(few="{"), "is damaged"),
    "bits that are a list": (about(few="[]"), "is damaged"),
    "other bits": (few(lambda held: held.update({NAME: [8, 32]})), "is damaged"),
    "odd bits": (few(lambda held: held.update({NAME: [5, 32]})), "is damaged"),
    "bits that are no number": (few(lambda held: held.update({NAME: ["4", 32]})), "is damaged"),
    "a group of none": (few(lambda held: held.update({NAME: [4, 0]})), "is damaged"),
    "a group of few": (few(lambda held: held.update({NAME: [4, 16]})), "is damaged"),
    "one weight less": (few(lambda held: held.pop(NAME)), "is damaged"),
    "bits of no weight": (few(lambda held: held.update(x=[4, 32])), "is damaged"),
    "one name more": (
        lambda p: edited(p, lambda h: h.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})),
        "is damaged",
    ),
    "another shape": (lambda p: edited(p, lambda header: header[f"{NAME}.data"]["shape"].reverse()), "is damaged"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_not_valid(damage: str, model: Path, load: Any, cache: Path) -> None:
    """A line that names it and why, and the weights from the model's own files. Where it is to be kept it is replaced,
    and nothing is said."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    change, why = DAMAGES[damage]
    change(path)
    with words() as said:
        found = load(model)
    (text,) = said
    assert text.startswith(f"{path}: {why}") and "--keep-packed" in text and "\n" not in text
    assert same(found, wanted) and not is_mapped(found, path)
    if path.is_dir():
        return
    assert same(load(model, keep_packed=True), wanted)
    assert is_mapped(load(model), path) and left_in(cache) == [path.name]


def test_no_byte_of_the_header_can_crash_it(model: Path, load: Any) -> None:
    """With any one of them turned over, the weights are those of the model or there is a word why not."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    whole = path.read_bytes()
    _, length = header_of(path)
    text = whole[8 : 8 + length].rstrip()
    for place in [*range(8), *range(8, 8 + len(text), 97)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with words() as said:
            found = load(model)
        assert same(found, wanted) and (said or is_mapped(found, path)), place


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": lambda weights: os.utime(weights, (1, 1)),
    "longer": lambda weights: weights.write_bytes(weights.read_bytes() + b" "),
    "fetched again": lambda weights: weights.write_bytes(weights.read_bytes()),
    "other content, same size and time": lambda weights: _overwrite(weights),
}


def _overwrite(path: Path) -> None:
    """As where a tool gives all files the same time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_has_changed(change: str, model: Path, load: Any) -> None:
    load(model, keep_packed=True)
    CHANGES[change](model / "model.safetensors")
    if change == "longer":
        os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    with pytest.warns(PackedCopyUnused, match="is of what the model's files were before"):
        fresh = load(model)
    assert same(load(model, keep_packed=True), fresh) and same(load(model), fresh)


def test_settings_that_have_changed(model: Path, load: Any) -> None:
    """`config.json` says how weights are read; what a tokenizer or defaults of requests say changes no weight."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    (model / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert is_mapped(load(model), path)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.warns(PackedCopyUnused, match="were before"):
        assert same(load(model), wanted)


def test_a_source_that_changes_while_it_is_read(
    model: Path, load: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "begin", lambda *_: os.utime(model / "model.safetensors", (1, 1)))
    with pytest.warns(PackedCopyUnused, match="no packed copy is kept .the model's files changed"):
        load(model, keep_packed=True)
    assert left_in(cache) == []


def test_one_type_at_a_time(model: Path, load: Any) -> None:
    """The other one is read from the files, with a word."""
    load(model, keep_packed=True)
    with pytest.warns(PackedCopyUnused, match="float32, not in bfloat16"):
        half = load(model, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not is_mapped(half, copy_path(model))
    load(model, dtype=torch.bfloat16, keep_packed=True)
    assert same(load(model, dtype=torch.bfloat16), half)


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
        why = "it takes 0.0 GB, the disk has 0.0 free"
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


def test_pages_that_the_disk_does_not_give(model: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the model's own files, instead of a crash in the first step. Where the system has no such call, each
    page comes when it is touched."""
    wanted = load(model, keep_packed=True)

    class Failing:
        """A mapping whose pages cannot be had."""

        def __init__(self, code: int):
            self.code = code

        def __len__(self) -> int:
            return 1

        def madvise(self, *_: int) -> None:
            raise OSError(self.code, os.strerror(self.code))

    populate, code = kept._populate, 14
    monkeypatch.setattr(kept, "_populate", lambda path, _: populate(path, Failing(code)))  # type: ignore[arg-type]
    with pytest.warns(PackedCopyUnused, match="cannot be read .Bad address"):
        assert same(load(model), wanted)
    code = 22
    assert is_mapped(load(model), copy_path(model))
