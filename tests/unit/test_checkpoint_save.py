"""What is saved is what is loaded, by dgemma and by transformers; a save that fails leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import Checkpoint, read_all, refused
from safetensors import safe_open

from dgemma.checkpoint import load_network, save_checkpoint
from dgemma.config import ModelConfig
from dgemma.errors import CheckpointError
from dgemma.model import Network
from dgemma.params import GenerationConfig

GENERATION = GenerationConfig(max_new_tokens=64, t_max=0.7, eos_token_ids=(1, 106), extra={"disable_compile": True})
VISION = "model.encoder.vision_tower.patch_embedder.input_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "source").write()


@pytest.fixture
def network(checkpoint: Checkpoint) -> Network:
    return load_network(checkpoint.directory, checkpoint.config)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same(network: Network, other: Network) -> bool:
    mine, theirs = network.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_round_trip_in_one_file(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    target = tmp_path / "deep" / "copy"
    save_checkpoint(network, checkpoint.config, target, generation=GENERATION)
    assert set(files(target)) == {"model.safetensors", "config.json", "generation_config.json"}
    saved = read_all(target)
    assert saved.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(saved[name], checkpoint.tensors[name]) for name in saved)
    config = ModelConfig.read(target / "config.json")
    assert config == checkpoint.config and config.raw == checkpoint.config.raw
    assert GenerationConfig.read(target / "generation_config.json") == GENERATION
    assert same(load_network(target, config), network)
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_round_trip_in_shards(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    target, limit = tmp_path / "copy", 4000
    save_checkpoint(network, checkpoint.config, target, generation=GENERATION, max_shard_bytes=limit)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 (not a dict)
        assert sum(sizes) <= limit or len(sizes) == 1
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert same(load_network(target, checkpoint.config), network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_saved_copy_is_in_its_configuration(
    checkpoint: Checkpoint, network: Network, tmp_path: Path, dtype: torch.dtype
):
    checkpoint.config.raw["text_config"]["dtype"] = "float32"
    save_checkpoint(network, checkpoint.config, tmp_path / "copy", generation=GENERATION, dtype=dtype)
    assert {tensor.dtype for tensor in read_all(tmp_path / "copy").values()} == {dtype}
    config = ModelConfig.read(tmp_path / "copy" / "config.json")
    assert config.dtype == str(dtype).removeprefix("torch.") == config.raw["text_config"]["dtype"]
    assert same(load_network(tmp_path / "copy", config), load_network(checkpoint.directory, config))
    assert checkpoint.config.raw["dtype"] == "float32"  # the caller's own stays as it was


def test_text_files_and_vision_tensors_come_along(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    checkpoint.tensors[VISION] = torch.randn(3, 5).to(torch.bfloat16)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.decoder.embed_tokens.weight"].clone()
    checkpoint.write()
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": "[]", "chat_template.jinja": "é"}
    for name, content in texts.items():
        (checkpoint.directory / name).write_text(content, encoding="utf-8")
    (checkpoint.directory / "notes.txt").write_text("not copied")
    target = tmp_path / "copy"
    options: dict[str, Any] = {"source": checkpoint.directory, "text_files": checkpoint.directory}
    save_checkpoint(network, checkpoint.config, target, generation=GENERATION, dtype=torch.float16, **options)
    saved = read_all(target)
    assert "lm_head.weight" not in saved
    assert saved[VISION].dtype == torch.bfloat16 and torch.equal(saved[VISION], checkpoint.tensors[VISION])
    for name, content in texts.items():
        assert (target / name).read_text(encoding="utf-8") == content
    assert not (target / "notes.txt").exists()


def test_saving_over_itself(checkpoint: Checkpoint, network: Network):
    checkpoint.tensors[VISION] = torch.randn(3, 5)
    checkpoint.write()
    (checkpoint.directory / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        network.norm.weight += 1
    where = checkpoint.directory
    for limit in (5e9, 4000, 8000, 5e9):  # shards of one save must not survive into the next
        save_checkpoint(
            network,
            checkpoint.config,
            where,
            generation=GENERATION,
            source=where,
            text_files=where,
            max_shard_bytes=limit,
        )
        with pytest.warns(UserWarning, match="1 tensors for images"):
            assert same(load_network(where, checkpoint.config), network)
        assert torch.equal(read_all(where)[VISION], checkpoint.tensors[VISION])
        assert (where / "tokenizer.json").read_text() == "{}"
        assert not [name for name in files(where) if name.startswith(".")]


@pytest.mark.parametrize("failing", ["tensor", "last file", "swap"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_everything_as_it_was(
    checkpoint: Checkpoint,
    network: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    existing: bool,
):
    target = tmp_path / "deep" / "target"
    if existing:
        shutil.copytree(checkpoint.directory, target)
        before = files(target)
    if failing == "tensor":
        real = torch.Tensor.contiguous
        calls = iter(range(100))
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: real(t) if next(calls) < 5 else 1 / 0)
    elif failing == "last file":
        dump = json.dumps
        monkeypatch.setattr(json, "dumps", lambda d, **kw: 1 / 0 if "model_type" in d else dump(d, **kw))
    else:
        replace, moves = os.replace, iter(range(100))
        stop = 3 if existing else 1

        def failing_replace(*paths: Any) -> None:
            if next(moves) == stop:
                raise OSError(28, "No space left on device")
            replace(*paths)

        monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises((ZeroDivisionError, CheckpointError)):
        save_checkpoint(network, checkpoint.config, target, generation=GENERATION)
    monkeypatch.undo()
    if existing:
        assert files(target) == before
    else:
        assert not target.parent.exists()


def test_places_that_cannot_be_written(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    def save(directory: Path) -> None:
        save_checkpoint(network, checkpoint.config, directory, generation=GENERATION)

    path = tmp_path / "file"
    path.write_text("precious")
    refused(lambda: save(path), str(path), "is a file")
    refused(lambda: save(path / "below"), str(path / "below"), "cannot be written")
    assert path.read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    path = tmp_path / "locked"
    path.mkdir(mode=0o500)
    refused(lambda: save_checkpoint(network, checkpoint.config, path, generation=GENERATION), str(path), "ermission")


def test_permission_error_of_the_system(
    checkpoint: Checkpoint, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def denied(self: Path, *rest: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(
        lambda: save_checkpoint(network, checkpoint.config, tmp_path / "x", generation=GENERATION),
        str(tmp_path / "x" / "model.safetensors"),
        "Permission denied",
    )


def test_what_is_no_network_is_refused(checkpoint: Checkpoint, network: Network, tmp_path: Path):
    def save(network: Any, **options: Any) -> None:
        save_checkpoint(network, checkpoint.config, tmp_path / "x", generation=GENERATION, **options)

    refused(lambda: save(torch.nn.Linear(2, 2)), "weight: not a floating-point weight of the network")
    refused(lambda: save(network, dtype=torch.int8), "not a floating-point weight")
    refused(lambda: save(network, max_shard_bytes=0), "max_shard_bytes")
    assert not (tmp_path / "x").exists()


def test_transformers_reads_it_with_the_same_logits(lab: Any, tmp_path: Path):
    """transformers' own checkpoint, loaded and saved by dgemma, gives transformers the same logits, images included."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    from tiny import SPECS, Reference, prompt

    original = lab.path("base")
    config = ModelConfig.read(original / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = load_network(original, config)
    options: dict[str, Any] = {"source": original, "text_files": original, "max_shard_bytes": 20_000}
    save_checkpoint(network, config, tmp_path / "copy", generation=GENERATION, **options)
    before, after = read_all(original), read_all(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = Reference(tmp_path / "copy"), lab.reference("base")
    tokens, canvas = prompt(SPECS["base"], 2, 9), prompt(SPECS["base"], 2, SPECS["base"].canvas, seed=1)
    caches = [ours.new_cache(), theirs.new_cache()]
    assert torch.equal(ours.encode(tokens, caches[0]), theirs.encode(tokens, caches[1]))
    assert torch.equal(ours.denoise(canvas, caches[0]), theirs.denoise(canvas, caches[1]))
    read = DiffusionGemmaGenerationConfig.from_pretrained(tmp_path / "copy")
    assert (read.max_new_tokens, read.t_max, read.eos_token_id) == (64, 0.7, [1, 106])
    assert read.sampler_config.entropy_bound == GENERATION.entropy_bound
