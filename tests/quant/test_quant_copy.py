"""`quantize_checkpoint`: bounded, resumable, all or nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits import FileLimit, Formats, odd_widths, tensors_of, unfused
from safetensors.torch import save_file

from dgemma.checkpoint import files, resumable
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.checkpoint.resumable import Progress
from dgemma.errors import CapacityError, CheckpointError, ConfigError, DGemmaError
from dgemma.quant import Policy, quantize

INT4 = Policy(format="int4")
SMALL = 60_000  # bytes a shard: several of them


def content(directory: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(source: Path, target: Path, kind: type[DGemmaError], *words: str, policy: Policy = INT4) -> None:
    with pytest.raises(kind) as caught:
        quantize_checkpoint(source, target, policy, max_shard_bytes=SMALL)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_every_matrix_is_rounded_as_it_should_be(source: Path, copies: Formats) -> None:
    """The tensors on disk are those of `quantize`, matrix by matrix, from the source's weights."""
    before, after = unfused(tensors_of(source)), tensors_of(copies("int4"))
    for module in ("layers.1.experts.3.up_proj", "layers.0.experts.0.down_proj", "layers.0.self_attn.v_proj"):
        wanted = quantize(before[f"model.decoder.{module}.weight"], bits=4, group=32)
        packed = after[f"model.decoder.{module}.weight_packed"].view(torch.uint8)
        assert torch.equal(packed, wanted.data), module
        assert torch.equal(after[f"model.decoder.{module}.weight_scale"].float(), wanted.scales)
    table = quantize(before["model.decoder.embed_tokens.weight"], bits=8, group=None)
    packed = after["model.decoder.embed_tokens.weight_packed"].view(torch.uint8)
    assert torch.equal(packed, table.data.view(torch.uint8) ^ 128)


def test_shards_are_one_model(source: Path, copies: Formats, tmp_path: Path) -> None:
    """However it is split, the tensors are the same, and so are the figures."""
    seen: list[Progress] = []
    done = quantize_checkpoint(source, tmp_path / "x", INT4, report=seen.append, max_shard_bytes=SMALL)
    shards = sorted(path.name for path in done.destination.glob("*.safetensors"))
    assert len(shards) > 3 and shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    one, many = tensors_of(copies("int4")), tensors_of(done.destination)
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert files.find_weights(done.destination).keys() == one.keys()  # the index agrees
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[0].done, seen[-1].done) == (0, done.nbytes) and {p.total for p in seen} == {done.nbytes}
    before = unfused(tensors_of(source))
    for kind, part in (("experts", ".experts."), ("attention", ".self_attn."), ("embedding", ".embed_tokens.")):
        own = [t for n, t in before.items() if n.startswith("model.decoder") and part in n and t.dim() == 2]
        assert done.errors[kind].weights == sum(tensor.numel() for tensor in own)
        exact = [
            quantize(t, bits=4 if kind != "embedding" else 8, group=32 if kind != "embedding" else None) for t in own
        ]
        error = sum(float((t - q.dequantize()).square().sum()) for t, q in zip(own, exact, strict=True))
        size = sum(float(t.square().sum()) for t in own)
        assert done.errors[kind].relative == pytest.approx((error / size) ** 0.5, rel=1e-4)
    assert done.group == 32 and 4.4 < done.errors["experts"].bits < 5.5


def test_memory_is_bounded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are read, rounded and written some rows at a time, with the same result."""
    from dgemma.checkpoint import quantize as module

    quantize_checkpoint(source, tmp_path / "whole", INT4)
    largest = 0
    read = module.read_tensor

    def watched(entry: Any, *rest: Any) -> Any:
        nonlocal largest
        tensor = read(entry, *rest)
        largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(module, "read_tensor", watched)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    quantize_checkpoint(source, tmp_path / "parts", INT4)
    assert largest <= 1000
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


KILLED = """
import os, signal, sys
from pathlib import Path
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.quant import Policy

def report(progress):
    if progress.shard == 3 and progress.done > 2.5 * {small}:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), Policy(format="int4"), report=report, max_shard_bytes={small})
"""


def test_a_run_that_was_killed_goes_on(source: Path, tmp_path: Path) -> None:
    """Killed in its third shard: nothing that looks whole is left, and the next run makes the rest, byte for byte."""
    code = [sys.executable, "-c", KILLED.format(small=SMALL), str(source), str(tmp_path / "x")]
    assert subprocess.run(code, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    partial = tmp_path / "x.partial"
    with pytest.raises(DGemmaError):
        files.find_weights(partial)
    assert not (partial / "config.json").exists()
    first = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(first) == 2
    refused(source, tmp_path / "x", CheckpointError, "other settings", "remove it", policy=Policy(format="int8"))
    seen: list[Progress] = []
    done = quantize_checkpoint(source, tmp_path / "x", INT4, report=seen.append, max_shard_bytes=SMALL)
    assert seen[0].shard == 3 and seen[0].done > SMALL
    assert all((done.destination / name).stat().st_mtime_ns == made for name, made in first.items())
    fresh = quantize_checkpoint(source, tmp_path / "y", INT4, max_shard_bytes=SMALL)
    assert content(done.destination) == content(fresh.destination)
    assert {kind: sums.relative for kind, sums in done.errors.items()} == pytest.approx(
        {kind: sums.relative for kind, sums in fresh.errors.items()}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_what_is_left_of_a_run_is_not_trusted_blindly(source: Path, tmp_path: Path) -> None:
    """A shard that is short is made again; another source is another run."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy)

    def stop(progress: Progress) -> None:
        if progress.shard == 3:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(copy, tmp_path / "x", INT4, report=stop, max_shard_bytes=SMALL)
        shard = min((tmp_path / "x.partial").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    assert not list((tmp_path / "x.partial").glob("*.tmp"))
    quantize_checkpoint(copy, tmp_path / "x", INT4, max_shard_bytes=SMALL)
    assert content(tmp_path / "x") == content(
        quantize_checkpoint(copy, tmp_path / "y", INT4, max_shard_bytes=SMALL).destination
    )

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(copy, tmp_path / "z", INT4, report=stop, max_shard_bytes=SMALL)
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    refused(copy, tmp_path / "z", CheckpointError, "z.partial", "another source")
    shutil.rmtree(tmp_path / "z.partial")
    quantize_checkpoint(copy, tmp_path / "z", INT4, max_shard_bytes=SMALL)
    (tmp_path / "w.partial").mkdir()
    (tmp_path / "w.partial" / "mine.txt").write_text("not ours")
    refused(copy, tmp_path / "w", CheckpointError, "w.partial", "remove it")


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written; and when it fills up on the way, what is done stays."""
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda path: free._replace(free=100_000))
    refused(source, tmp_path / "x", CapacityError, "0.1 MB free", str(tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))
    monkeypatch.undo()
    with FileLimit(SMALL // 2):
        refused(source, tmp_path / "x", CheckpointError, "model-00001-of", "cannot be written", "goes on")
    assert not list((tmp_path / "x.partial").iterdir()) and not (tmp_path / "x").exists()
    quantize_checkpoint(source, tmp_path / "x", INT4, max_shard_bytes=SMALL)


def test_destinations_that_are_in_the_way(source: Path, tmp_path: Path) -> None:
    refused(source, source, CheckpointError, "exists; name a directory that does not")
    (tmp_path / "file").write_text("x")
    refused(source, tmp_path / "file", CheckpointError, "exists")
    refused(source, tmp_path / "file" / "x", CheckpointError, "cannot be written")
    (tmp_path / "empty").mkdir()
    assert quantize_checkpoint(source, tmp_path / "empty", INT4).destination == tmp_path / "empty"
    assert quantize_checkpoint(source, tmp_path / "a" / "b", INT4).destination.is_dir()


def test_sources_that_are_damaged(source: Path, tmp_path: Path) -> None:
    """Infinities are found on the way; nothing is left that looks whole."""
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(source)
    tensors["model.decoder.layers.1.experts.down_proj"][2, 0, 0] = float("inf")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    refused(tmp_path / "source", tmp_path / "x", CheckpointError, "layers.1.experts.2.down_proj", "infinity")
    assert not (tmp_path / "x").exists()
    del tensors["model.decoder.norm.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    refused(tmp_path / "source", tmp_path / "x", CheckpointError, "model.decoder.norm.weight is missing")


def test_widths_that_no_group_divides(source: Path, tmp_path: Path, load: Any) -> None:
    """Refused by name, before anything is written; whole rows, and 8 bits, take any width."""
    odd = odd_widths(source, tmp_path / "odd")
    refused(odd, tmp_path / "x", ConfigError, "layers.0.experts.down_proj is 20 wide", "multiple of 32", "experts")
    assert not (tmp_path / "x.partial").exists()
    for name, policy in {
        "row": Policy(format="int4", group="row"),
        "kept": Policy(format="int4", kinds={"experts": "keep"}),
        "int8": Policy(format="int8"),
        "fp8": Policy(format="fp8"),
    }.items():
        done = quantize_checkpoint(odd, tmp_path / name, policy)
        held, exact = load(done.destination).quantized(), load(done.destination, dequantize=True).state_dict()
        assert held
        for weight in held if name != "fp8" else ():  # which is held as int8
            assert torch.equal(held[weight].dequantize(), exact[weight]), weight


@pytest.mark.parametrize("first", ["fp8", "int4"])
def test_a_source_that_is_in_few_bits_already(
    first: str, source: Path, copies: Formats, tmp_path: Path, load: Any
) -> None:
    """It's rounded again, from the weights that it stands for; what is kept becomes floating-point."""
    policy = Policy(format="int8", kinds={"embedding": "keep", "mlp": "keep"})
    done = quantize_checkpoint(copies(first), tmp_path / "x", policy)
    before = load(copies(first), dequantize=True).state_dict()
    after = load(done.destination, dequantize=True).state_dict()
    for name, weight in before.items():
        kept = "embed" in name or ".mlp." in name or weight.dim() == 1
        off = float((after[name] - weight).norm() / weight.norm())
        assert (off == 0) if kept or "router" in name or "self_cond" in name else (0 < off < 0.02), name


@pytest.fixture(autouse=True)
def _no_litter(source: Path) -> Iterator[None]:
    """No test writes beside the source."""
    before = sorted(source.parent.iterdir())
    yield
    assert sorted(source.parent.iterdir()) == before
