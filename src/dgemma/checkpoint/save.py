"""A network as a model directory that dgemma and transformers read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelConfig
from ..errors import CheckpointError
from ..model import Network
from ..params import GenerationConfig
from ..quant.scheme import KEY
from .files import FLOATS, INDEX, SINGLE, find_weights
from .names import Kind, classify, disk_name, network_name
from .writer import Outgoing, Staging, stage_weights

# Copied as they are. The processors' files are for images; they would otherwise be lost with a copy of the weights.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_TYPES = {getattr(torch, name): code for code, name in FLOATS.items()}


def save_checkpoint(
    network: nn.Module,
    config: ModelConfig,
    directory: Path,
    *,
    generation: GenerationConfig,
    text_files: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    source: Path | None = None,
) -> None:
    """Writes weights, `config.json` and `generation_config.json`; all of it appears at once, or nothing does.

    Files are written under temporary names beside the old ones, which stay valid until the end, so a directory may be
    saved over itself; the disk needs room for both. Weights of an older save are removed with the swap.

    Args:
        network: its tensors may be on any device; one at a time is copied.
        config: `config.raw` becomes `config.json`, with the type that the weights have now.
        directory: made if need be.
        generation: becomes `generation_config.json`.
        text_files: a directory whose tokenizer and chat template files are copied along.
        dtype: type of the weights on disk; None is the type that each one has.
        max_shard_bytes: above this the weights are split.
        source: a checkpoint whose tensors for images are copied along, unchanged.

    Raises:
        CheckpointError: the directory cannot be written, or `source` cannot be read; or weights are in few bits.
    """
    directory = Path(directory)
    if isinstance(network, Network) and network.quantized():
        raise CheckpointError(f"{directory}: a network in few bits cannot be saved; copy the directory it came from")
    if not max_shard_bytes > 0:
        raise CheckpointError(f"max_shard_bytes: {max_shard_bytes} is not above 0")
    tensors = [_outgoing(name, tensor, dtype) for name, tensor in network.state_dict().items()]
    if source is not None:
        entries = find_weights(Path(source)).values()
        tensors += [Outgoing.copy_of(entry) for entry in entries if classify(entry.name) is Kind.VISION]
    saved_type = FLOATS[tensors[0].dtype]
    with Staging(directory) as staging:
        stage_weights(staging, tensors, max_shard_bytes)
        staging.write_json("generation_config.json", generation.to_dict())
        if text_files is not None:
            _copy_text_files(staging, Path(text_files))
        staging.write_json("config.json", _with_type(config.raw, saved_type))
        staging.commit(remove=_old_weights(directory))


def _outgoing(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Outgoing:
    kind = tensor.dtype if dtype is None else dtype
    if network_name(disk_name(name)) != name or kind not in _TYPES:
        raise CheckpointError(f"{name}: not a floating-point weight of the network; save it before it is quantised")

    def blocks() -> Iterable[memoryview]:
        ready: Any = tensor.detach().to(device="cpu", dtype=kind).contiguous().view(-1).view(torch.uint8).numpy()
        return [memoryview(ready)]

    return Outgoing(name=disk_name(name), dtype=_TYPES[kind], shape=tuple(tensor.shape), blocks=blocks)


def _copy_text_files(staging: Staging, text_files: Path) -> None:
    for name in TEXT_FILES:
        path = text_files / name
        if path.is_file():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
            with staging.open(name) as file:
                file.write(content)


def _with_type(raw: dict[str, Any], saved_type: str) -> dict[str, Any]:
    """The content of `config.json` with the weights' type wherever it names one, and nothing of few bits."""
    result = {key: value for key, value in raw.items() if key not in ("torch_dtype", KEY)} | {"dtype": saved_type}
    text = result.get("text_config")
    if isinstance(text, dict):
        result["text_config"] = {
            key: saved_type if key == "dtype" else value for key, value in text.items() if key != "torch_dtype"
        }
    return result


def _old_weights(directory: Path) -> set[Path]:
    """Weight files of an earlier save, sharded differently perhaps: left there, they would contradict the new ones."""
    return {directory / SINGLE, directory / INDEX, *directory.glob("model-*-of-*.safetensors")}
