"""Small model directories for the checkpoint tests, written with the safetensors library, and broken on purpose."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.checkpoint.load import empty_network
from dgemma.checkpoint.names import disk_name
from dgemma.config import ModelConfig
from dgemma.errors import CheckpointError

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "sliding_window": 8,
}
NORM = "model.decoder.norm.weight"
GATE = "model.decoder.layers.1.mlp.gate_proj.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


def config_dict(**text: Any) -> dict[str, Any]:
    """The content of a small config.json."""
    return {
        "model_type": "diffusion_gemma",
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": 8,
        "dtype": "float32",
        "text_config": {"model_type": "diffusion_gemma_text", **copy.deepcopy(SIZES), **text},
    }


def release_dict(spelling: str = "release") -> dict[str, Any]:
    """The released 26B model's config.json, from the sizes on record, in either spelling."""
    full = range(5, 30, 6)
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_experts": 128,
        "top_k_experts": 8,
        "num_hidden_layers": 30,
        "layer_types": ["full_attention" if index in full else "sliding_attention" for index in range(30)],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
    }
    if spelling == "release":
        text |= {"global_head_dim": 512, "num_global_key_value_heads": 2, "final_logit_softcapping": 30.0}
    else:
        text["per_layer_config"] = {str(index): {"head_dim": 512, "num_key_value_heads": 2} for index in full}
    return {"model_type": "diffusion_gemma", "canvas_length": 256, "dtype": "bfloat16", "text_config": text}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by their names on disk."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in empty_network(config).state_dict().items()}
    return {disk_name(name): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Checkpoint:
    """A small model directory that tests change; `tensors` is what `write` puts into it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config = ModelConfig.from_dict(config_dict())
        self.tensors = random_tensors(self.config)
        (directory / "config.json").write_text(json.dumps(self.config.raw))

    @property
    def file(self) -> Path:
        return self.directory / "model.safetensors"

    def write(self) -> Checkpoint:
        """One file."""
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.file)
        return self

    def write_shards(self, count: int = 3) -> Checkpoint:
        """Several files and their index."""
        names = sorted(self.tensors)
        where = {name: shard_name(index * count // len(names), count) for index, name in enumerate(names)}
        for file in set(where.values()):
            save_file({name: self.tensors[name] for name in names if where[name] == file}, self.directory / file)
        self.write_index(where)
        return self

    def write_index(self, where: dict[str, str]) -> None:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def read_index(self) -> dict[str, str]:
        return json.loads((self.directory / "model.safetensors.index.json").read_text())["weight_map"]

    def edit_header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the header of `file` and leaves the tensors' bytes as they are."""
        raw = self.file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        new = json.dumps(change(header) or header).encode()
        self.file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a directory's safetensors files, read with the library."""
    result: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        result |= load_file(path)
    return result


def refused(call: Callable[[], object], *words: str, kind: type[Exception] = CheckpointError) -> str:
    """Checks that `call` raises one line with all of `words` in it."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message
