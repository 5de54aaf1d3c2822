"""What the tests of few bits share: sizes, a look of a network, and files written by the compressed-tensors package."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny import Spec

Formats = Callable[[str], Path]
SPEC = Spec(
    name="few_bits",
    hidden=64, intermediate=96, layers="sf", heads=4, kv_heads=2, head_dim=16, global_head_dim=32,
    vocab=96, experts=4, top_k=2, moe_intermediate=32, canvas=8, mix=0.5, shard="200KB", seed=40,
)  # fmt: skip
TEXT_LINEAR = re.compile(
    r"model\.decoder\.(layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj|experts\.\d+\.\w+_proj))\.weight"
)


@torch.no_grad()
def look(network: Any) -> torch.Tensor:
    """Logits of a second look at a canvas, after a prompt: every weight takes part."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, SPEC.vocab - 3, (2, 9), generator=generator)
    canvas = torch.randint(3, SPEC.vocab - 3, (2, SPEC.canvas), generator=generator)
    cache = network.new_cache(batch=2)
    network.encode(prompt, cache)
    first = network.denoise(canvas, cache)
    return network.denoise(canvas, cache, network.soft_embeddings(first))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root of the mean squared difference, relative to the wanted values."""
    return float((found - wanted).norm() / wanted.norm())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a directory's safetensors files, read with the library."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def unfused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on disk with the fused experts taken apart, as tools that quantise do it."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if last == "down_proj":
                result[f"{stem}.{expert}.down_proj.weight"] = matrix.contiguous()
                continue
            gate, up = matrix.chunk(2)
            result[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
            result[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
    return result


def package_copy(source: Path, target: Path, scheme: dict[str, Any], fmt: str) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint whose matrices the compressed-tensors package has compressed.

    Its scales, its rounding, its packing, its section of config.json. Returns the float weights that the package
    itself makes of it again, by name on disk.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    tensors = unfused(tensors_of(source))
    group = QuantizationScheme(targets=["Linear"], **scheme)
    group.format = fmt
    compressor = BaseCompressor.get_value_from_registry(fmt)
    written: dict[str, torch.Tensor] = {}
    back: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not TEXT_LINEAR.fullmatch(name):
            written[name] = tensor
            continue
        args, whole = group.weights, None
        low, high = _extremes(tensor, args)
        if args.strategy == "tensor_group":
            whole = generate_gparam(tensor.amin(), tensor.amax())
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        state = {"weight": tensor, "weight_scale": scale.to(torch.float32 if whole is not None else tensor.dtype)}
        if whole is not None:
            state["weight_global_scale"] = whole
        if not args.symmetric:
            state["weight_zero_point"] = zero
        packed = compressor.compress(state, group)
        stem = name.removesuffix(".weight")
        written |= {f"{stem}.{part}": value.contiguous() for part, value in packed.items()}
        back[name] = _unpacked(packed, group, compressor)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(written, target / "model.safetensors")
    config = QuantizationConfig(config_groups={"group_0": group}, format=fmt, quantization_status="compressed")
    section = config.model_dump(mode="json") | {"ignore": ["lm_head"], "version": "0.20.0", "sparsity_config": {}}
    data = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(data | {"quantization_config": section}))
    return back


def _unpacked(packed: dict[str, torch.Tensor], group: Any, compressor: Any) -> torch.Tensor:
    """What the package makes of its own tensors, in float32 (of NVFP4 it would make bfloat16)."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if "weight_global_scale" not in packed:
        return compressor.decompress(dict(packed), group)["weight"].float()
    rows, half = packed["weight_packed"].shape
    return dequantize(
        x_q=unpack_fp4_from_uint8(packed["weight_packed"], rows, 2 * half).float(),
        scale=packed["weight_scale"].float(),
        args=group.weights,
        global_scale=packed["weight_global_scale"],
        dtype=torch.float32,
    )


def _extremes(tensor: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of each group, row, or of all."""
    if args.strategy in ("group", "tensor_group"):
        parts = tensor.unflatten(-1, (-1, args.group_size))
        return parts.amin(dim=-1), parts.amax(dim=-1)
    if args.strategy == "channel":
        return tensor.amin(dim=-1, keepdim=True), tensor.amax(dim=-1, keepdim=True)
    return tensor.amin().reshape(1), tensor.amax().reshape(1)


def weights_on_disk(network: Any) -> dict[str, torch.Tensor]:
    """A network's float weights by their names on disk, experts taken apart."""
    from dgemma.checkpoint.names import disk_name

    return unfused({disk_name(name): tensor.detach() for name, tensor in network.state_dict().items()})


def odd_widths(source: Path, target: Path) -> Path:
    """A checkpoint whose experts are 20 wide."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    data = json.loads((source / "config.json").read_text())
    data["text_config"]["moe_intermediate_size"] = 20
    (target / "config.json").write_text(json.dumps(data))
    tensors = tensors_of(source)
    for name in [name for name in tensors if ".experts." in name]:
        shape = (4, 40, 64) if name.endswith("gate_up_proj") else (4, 64, 20)
        tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8
    save_file(tensors, target / "model.safetensors")
    return target


class FileLimit:
    """No file may grow beyond so many bytes: what a write to a full disk looks like from here."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
