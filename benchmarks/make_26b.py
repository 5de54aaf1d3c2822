"""Random weights at the released 26B model's sizes, written to disk directly in few bits (about 14 GB in int4).

    python benchmarks/make_26b.py DIRECTORY [--format int4] [--layers 30] [--seed 0]

For measuring time and memory; the text is noise. Layer for layer the files are those that `dgemma quantize` makes of
the release, without images: the same names, layouts, groups and kinds. Values are drawn in few bits at once, uniformly,
and scaled so that activations stay of the order of one. Routing of random weights is near uniform: nearly every expert
is read in every step, the worst case. Memory stays at some hundred MB; an interrupted run goes on where it was.
`--layers 6` makes the network of the first 6 layers (5 sliding, 1 full).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def items(config: ModelConfig, policy: Policy, seed: int) -> tuple[list[Item], dict[str, Layout]]:
    """Every tensor of the network, and the layouts of those in few bits."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}
    layouts, _ = plan(policy, shapes)
    found: list[Item] = []
    for number, (name, shape) in enumerate(shapes.items()):
        layout = layouts.get(kind_of(name) or "")
        # A matrix keeps the size of what it is given; scores spread over a few units, as in a trained model.
        size = (4.0 if name.startswith("embed") else 1.0) * shape[-1] ** -0.5
        if layout is None:
            found.append(_plain(name, shape, size, seed * 1_000_003 + number))
            continue
        experts = list(range(shape[0])) if len(shape) == 3 else [None]
        for expert in experts:
            modules = module_names(name, expert)
            each = (shape[-2] // len(modules), shape[-1])
            for half, module in enumerate(modules):
                own = (seed * 1_000_003 + number) * 1_000 + 2 * (expert or 0) + half
                found.append(_matrix(module, layout, each, size, own))
    return found, layouts


def _plain(name: str, shape: tuple[int, ...], size: float, seed: int) -> Item:
    """A tensor in bfloat16: norms and scalars around 1, matrices around 0."""

    def blocks() -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if len(shape) == 1 else values * size
        ready: Any = values.bfloat16().view(-1).view(torch.uint8).numpy()
        yield memoryview(ready)

    return tensor_item(disk_name(name), "BF16", shape, blocks)


def _matrix(module: str, layout: Layout, shape: tuple[int, int], size: float, seed: int) -> Item:
    """A matrix in few bits, drawn as it is held."""
    rows, width = shape

    def blocks(_: object) -> Iterator[Quantized]:
        generator = torch.Generator().manual_seed(seed)
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data, spread = _values(layout, count, width, generator)
            scales = torch.rand(count, width // layout.group if layout.group else 1, generator=generator) * 0.5 + 0.75
            scales = (scales * size / spread).bfloat16().float()
            yield Quantized(bits=layout.bits, group=layout.group, data=data, scales=scales)

    return matrix_item(module, layout, shape, blocks)


def _values(layout: Layout, rows: int, width: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Random values, and their standard deviation."""
    if layout.name == FLOAT:
        return (torch.randn(rows, width, generator=generator) * 100).to(torch.float8_e4m3fn), 100.0
    if layout.bits == 8:
        return torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8), 73.3
    return torch.randint(0, 256, (rows, width // 2), generator=generator, dtype=torch.uint8), 4.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    content = configuration(options.layers)
    tensors, layouts = items(ModelConfig.from_dict(content), Policy(format=options.format), options.seed)
    settings = {"made by": "make_26b", "format": options.format, "layers": options.layers, "seed": options.seed}
    work = Resumable(options.directory, tensors, settings, SHARD)

    def report(progress: Progress) -> None:
        done, total = progress.done / 1e9, progress.total / 1e9
        sys.stderr.write(f"\r{done:.1f} of {total:.1f} GB, shard {progress.shard} of {progress.shards} ")

    work.run(report)
    work.finish({"config.json": (json.dumps(content | {KEY: write(layouts)}, indent=2) + "\n").encode()})
    sys.stderr.write("\n")
    sys.stdout.write(json.dumps({"directory": str(work.destination), "bytes": work.nbytes, **settings}) + "\n")


if __name__ == "__main__":
    main()
