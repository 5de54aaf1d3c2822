"""Random weights at the released 26B model's sizes, written to disk directly in few bits (about 14 GB in int4).

    python benchmarks/make_26b.py DIRECTORY [--format int4|int8|fp8|bfloat16] [--layers 30] [--seed 0]

For measuring time and memory; the text is noise. Layer for layer the files are those that `dgemma quantize` makes of
the release, without images: the same names, layouts, groups and kinds; in bfloat16 they are laid out as the release.
Values are drawn in few bits at once, uniformly, and scaled so that activations stay of the order of one. Two things are
at their worst: routing is near uniform, so that nearly every expert is read in every step, and scores differ by a unit
or so, so that no word of the vocabulary can be left out. Memory stays at some hundred MB; an interrupted run goes on
where it was. `--layers 6` makes the network of the first 6 layers (5 sliding, 1 full).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgemma.checkpoint.load import empty_network
from dgemma.checkpoint.names import disk_name, module_names
from dgemma.checkpoint.quantize import SHARD, matrix_item, plan, tensor_item
from dgemma.checkpoint.resumable import Item, Progress, Resumable
from dgemma.config import ModelConfig
from dgemma.quant import FORMATS, Policy, Quantized, kind_of
from dgemma.quant.layouts import FLOAT, Layout
from dgemma.quant.scheme import KEY, write

BLOCK = 1 << 24  # weights that are drawn at a time
PLAIN = "bfloat16"
SIZES: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 262_144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_experts": 128,
    "top_k_experts": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "tie_word_embeddings": True,
}


def configuration(layers: int) -> dict[str, Any]:
    """The content of `config.json` with the first so many layers; the last is always a full one."""
    kinds = ["full_attention" if number % 6 == 5 else "sliding_attention" for number in range(layers)]
    kinds[-1] = "full_attention"
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "dtype": "bfloat16",
        "text_config": SIZES | {"num_hidden_layers": layers, "layer_types": kinds},
    }


def items(config: ModelConfig, form: str, seed: int) -> tuple[list[Item], dict[str, Layout]]:
    """Every tensor of the network, and the layouts of those in few bits."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}
    layouts = {} if form == PLAIN else plan(Policy(format=form), shapes)[0]
    found: list[Item] = []
    for number, (name, shape) in enumerate(shapes.items()):
        layout = layouts.get(kind_of(name) or "")
        if layout is None:
            found.append(_plain(name, shape, [seed, number]))
            continue
        experts = list(range(shape[0])) if len(shape) == 3 else [None]
        for expert in experts:
            modules = module_names(name, expert)
            each = (shape[-2] // len(modules), shape[-1])
            for half, module in enumerate(modules):
                found.append(_matrix(module, layout, each, [seed, number, expert or 0, half]))
    return found, layouts


def _plain(name: str, shape: tuple[int, ...], seed: list[int]) -> Item:
    """A tensor in bfloat16: norms and scalars around 1; matrices that keep the size of what they are given."""

    def blocks() -> Iterator[memoryview]:
        generator = np.random.default_rng(seed)
        total = math.prod(shape)
        for first in range(0, total, BLOCK):
            values = torch.from_numpy(generator.standard_normal(min(BLOCK, total - first), dtype=np.float32))
            values = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
            ready: Any = values.bfloat16().view(torch.uint8).numpy()
            yield memoryview(ready)

    return tensor_item(disk_name(name), "BF16", shape, blocks)


def _matrix(module: str, layout: Layout, shape: tuple[int, int], seed: list[int]) -> Item:
    """A matrix in few bits, drawn as it is held; it keeps the size of what it is given."""
    rows, width = shape

    def blocks(_: object) -> Iterator[Quantized]:
        generator = np.random.default_rng(seed)
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data, spread = _values(layout, count, width, generator)
            groups = width // layout.group if layout.group else 1
            scales = torch.from_numpy(generator.random((count, groups), dtype=np.float32)) * 0.5 + 0.75
            scales = (scales * width**-0.5 / spread).bfloat16().float()
            yield Quantized(bits=layout.bits, group=layout.group, data=data, scales=scales)

    return matrix_item(module, layout, shape, blocks)


def _values(layout: Layout, rows: int, width: int, generator: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Random values, and their standard deviation."""
    if layout.name == FLOAT:
        normal = torch.from_numpy(generator.standard_normal((rows, width), dtype=np.float32))
        return (normal * 100).clamp_(-448, 448).to(torch.float8_e4m3fn), 100.0
    return centred(
        torch.from_numpy(generator.integers(0, 256, (rows, width * layout.bits // 8), dtype=np.uint8)), layout.bits
    )


def centred(data: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """Random bytes as weights of 4 or 8 bits whose mean is zero, and their standard deviation.

    The least value, which has no positive counterpart, becomes 0: with a mean, layer after layer would turn all tokens
    the same way, and they would all choose the same experts.
    """
    if bits == 8:
        values = data.view(torch.int8)
        return values.masked_fill_(values == -128, 0), 73.6
    low, high = data & 15, data >> 4
    return torch.where(low == 0, 8, low) | torch.where(high == 0, 8, high) << 4, 4.18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", choices=(*FORMATS, PLAIN), default="int4")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    content = configuration(options.layers)
    tensors, layouts = items(ModelConfig.from_dict(content), options.format, options.seed)
    settings = {"made by": "make_26b", "format": options.format, "layers": options.layers, "seed": options.seed}
    work = Resumable(options.directory, tensors, settings, SHARD)

    told = 0

    def report(progress: Progress) -> None:
        nonlocal told
        if progress.shard != told:
            told = progress.shard
            sys.stderr.write(f"{progress.done / 1e9:.1f} of {progress.total / 1e9:.1f} GB are written\n")

    work.run(report)
    section = {KEY: write(layouts)} if layouts else {}
    work.finish({"config.json": (json.dumps(content | section, indent=2) + "\n").encode()})
    sys.stdout.write(json.dumps({"directory": str(work.destination), "bytes": work.nbytes, **settings}) + "\n")


if __name__ == "__main__":
    main()
