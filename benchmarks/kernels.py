"""The CPU kernels at the released network's sizes: operations a second, and what share of the peak that is.

    python benchmarks/kernels.py [SECTION ...]     linear, experts, vocabulary, demo; all if none is named

Weights are random, and routing is uniform, the worst case for reading experts. Each figure is the median of several
rounds, alternating with what it is beside: torch in bfloat16 and float32 for products, the sampler's own functions for
the demo. The peak is what the same instruction set reaches on a product that stays in the cache. Raw records are
written under benchmarks/results/; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import Results
from torch import Tensor
from torch.nn import functional as F

import dgemma
from dgemma import SamplingParams
from dgemma.diffusion.canvas import process
from dgemma.kernels import cpu
from dgemma.kernels.belief import read
from dgemma.model.linear import linear
from dgemma.quant import Quantized

HIDDEN, WIDTH, EXPERTS, CHOSEN, WORDS, CANVAS = 2816, 704, 128, 8, 262_144, 256
Ways = dict[str, Callable[[], Any]]


def weight(bits: int, group: int | None, *shape: int) -> cpu.Weight:
    """Random and packed."""
    *head, width = shape
    kind = torch.uint8 if bits == 4 else torch.int8
    data = torch.randint(0, 256, (*head, width * bits // 8), dtype=torch.uint8).view(kind)
    scales = torch.full((*head, width // group if group else 1), 0.02 / (4 if bits == 4 else 64))
    return cpu.pack(Quantized(bits=bits, group=group, data=data, scales=scales))


def alternate(results: Results, section: str, ways: Ways, operations: float, rounds: int, **facts: Any) -> Any:
    """Times several ways in turn; medians in seconds."""
    for call in ways.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
            results.add(
                section=section, way=name, round=number, seconds=seconds[name][-1],
                gops=operations / seconds[name][-1] / 1e9, **facts,
            )  # fmt: skip
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak(results: Results, rounds: int) -> float:
    """GOP/s of a product of 4 bits whose weights stay in each core's cache."""
    small, x = weight(4, 64, 256, 1024), torch.randn(96 * torch.get_num_threads(), 1024)
    operations = 2.0 * len(x) * 256 * 1024
    times = alternate(results, "peak", {"int4": lambda: cpu.linear(x, small)}, operations, 10 * rounds)
    return operations / times["int4"] / 1e9


def linears(results: Results, rounds: int) -> dict[str, Any]:
    """A projection of 4096 outputs, at a canvas, an expert's share and one row, beside torch."""
    figures = {}
    dense = torch.randn(4096, HIDDEN) * 0.02
    half = dense.bfloat16()
    packed = {"int4": weight(4, 64, 4096, HIDDEN), "int8": weight(8, None, 4096, HIDDEN)}
    for rows in (CANVAS, 16, 1):
        x = torch.randn(rows, HIDDEN)
        own = x.bfloat16()
        ways: Ways = {name: lambda w=w, x=x: cpu.linear(x, w) for name, w in packed.items()}
        ways["float32"] = lambda x=x: F.linear(x, dense)
        ways["bfloat16"] = lambda x=own: F.linear(x, half)
        operations = 2.0 * rows * 4096 * HIDDEN
        times = alternate(results, "linear", ways, operations, rounds, rows=rows)
        figures |= {f"linear_{name}_{rows}_gops": operations / spent / 1e9 for name, spent in times.items()}
    return figures


def experts(results: Results, rounds: int) -> dict[str, Any]:
    """One layer's experts for a canvas."""
    gate_up, down = weight(4, 64, EXPERTS, 2 * WIDTH, HIDDEN), weight(4, 64, EXPERTS, HIDDEN, WIDTH)
    x, weights = torch.randn(CANVAS, HIDDEN), torch.rand(CANVAS, CHOSEN)
    chosen = torch.rand(CANVAS, EXPERTS).topk(CHOSEN, dim=-1).indices
    operations = 2.0 * CANVAS * CHOSEN * 3 * WIDTH * HIDDEN
    ways: Ways = {"int4": lambda: cpu.experts(x, weights, chosen, gate_up, down)}
    spent = alternate(results, "experts", ways, operations, rounds)["int4"]
    return {"experts_seconds": spent, "experts_gops": operations / spent / 1e9}


def vocabulary(results: Results, rounds: int) -> dict[str, Any]:
    """The step for a canvas: when nearly every word counts, when positions are sure, and scores alone."""
    table = weight(8, None, WORDS, HIDDEN)
    assert isinstance(table, cpu.Packed)
    wish, uniform = cpu.Wish(heat=0.6, cap=30.0), torch.rand(CANVAS)
    flat = torch.randn(CANVAS, HIDDEN).bfloat16()
    words = torch.randint(0, WORDS, (CANVAS,))
    sure = table.rows(words) * 15 + torch.randn(CANVAS, HIDDEN) * 0.01
    ways: Ways = {
        "flat": lambda: cpu.vocabulary(flat, table, wish, uniform=uniform),
        "sure": lambda: cpu.vocabulary(sure.bfloat16(), table, wish, uniform=uniform, hint=words),
        "scores": lambda: cpu.vocabulary(flat, table, wish, uniform=uniform, soft=False),
    }
    operations = 2.0 * CANVAS * WORDS * HIDDEN
    shares = {f"vocabulary_{name}_share_blended": ways[name]().share for name in ("flat", "sure")}
    times = alternate(results, "vocabulary", ways, operations, rounds)
    return shares | {f"vocabulary_{name}_seconds": spent for name, spent in times.items()}


def demo(results: Results, rounds: int) -> dict[str, Any]:
    """What follows the demo's last layer, for a canvas: the sampler's functions against the fused ones."""
    network = dgemma.load("demo").network
    table = network.embed_tokens.weight.detach()
    cap = network.config.final_logit_softcapping
    hidden, uniform = torch.randn(1, CANVAS, table.shape[1]) * 3, torch.rand(CANVAS)
    wish = cpu.Wish(heat=0.6, cap=cap)

    def separate() -> list[Tensor]:
        found = []
        for first in range(0, CANVAS, 64):
            scores = network.logits(hidden[:, first : first + 64])
            processed = process(scores, SamplingParams(), cpu.Wish(heat=0.6))
            belief, weights, total = read(processed, uniform[None, first : first + 64])
            network.blend(weights) / total
            found.append(belief.sampled[0])
        return found

    def fused() -> Tensor:
        return cpu.vocabulary(hidden[0], table, wish, uniform=uniform, product=linear).found.sampled

    assert torch.equal(torch.cat(separate()), fused())
    times = alternate(results, "demo", {"separate": separate, "fused": fused}, 0.0, 3 * rounds)
    return {f"demo_{name}_seconds": spent for name, spent in times.items()}


SECTIONS = {"linear": linears, "experts": experts, "vocabulary": vocabulary, "demo": demo}


@torch.no_grad()
def main() -> None:
    """Runs the sections named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    config = {"isa": cpu.isa(), "threads": torch.get_num_threads(), "rounds": options.rounds}
    results = Results("kernels", config)
    figures: dict[str, Any] = {"isa": cpu.isa(), "peak_gops": peak(results, options.rounds)}
    for name in options.sections or SECTIONS:
        figures |= SECTIONS[name](results, options.rounds)
    shares = {
        f"{name.removesuffix('_gops')}_share_of_peak": value / figures["peak_gops"]
        for name, value in figures.items()
        if name.endswith("_gops") and ("int4" in name or name.startswith("experts"))
    }
    told = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in figures.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in told.items())
    summary = f"# Kernels\n\nRandom weights, uniform routing.\n\n| figure | value |\n|---|---|\n{rows}"
    sys.stdout.write(results.close(summary, figures | shares) + "\n")


if __name__ == "__main__":
    main()
