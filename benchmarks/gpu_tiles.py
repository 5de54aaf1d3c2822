"""Which tiles are fastest on this card: every kernel that has a choice, at the 26B's sizes, over a list of tiles.

    python benchmarks/gpu_tiles.py [OPERATION ...] [--tokens 256 2048] [--forms fp8 int4 ...]

Operations are linear, gate_up, down, attend, scores and blend. What is compiled is compiled beforehand by several
processes. For each case the fastest are printed beside the one that `kernels/triton/tiles.py` takes; raw records are
written under benchmarks/results/, and the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import torch
from gpu_case import timed
from gpu_weights import config_of, random_quantized
from record import Results
from torch import Tensor

from dgemma.config import AttentionShape
from dgemma.kernels import gpu, plain
from dgemma.kernels.triton import attention, experts, linear, tiles, vocabulary
from dgemma.kernels.triton.common import FOUR_BITS, Operand, operand
from dgemma.kernels.triton.tiles import Tile
from dgemma.quant import Quantized

CONFIG = config_of(6, tiny=False)
DEVICE = torch.device("cuda")
OPERATIONS = ("linear", "gate_up", "down", "attend", "scores", "blend")
FORMS = ("fp8", "int4", "nvfp4", "int8", "bfloat16")
Ints = tuple[int, ...]


class Case(NamedTuple):
    """One kernel at one size, and the tiles to try.

    Fields:
        run: with a tile.
        own: the tile that is taken now.
        moved: bytes that must be read.
    """

    name: str
    run: Callable[[Tile], Any]
    own: Tile
    trials: list[Tile]
    moved: int


def grid(rows: Ints, columns: Ints, inner: Ints, *shapes: tuple[int, int]) -> list[Tile]:
    """All combinations; `shapes` are warps and stages."""
    return [
        Tile(rows=r, columns=c, inner=k, warps=w, stages=s)
        for r, c, k, (w, s) in itertools.product(rows, columns, inner, shapes)
    ]


def weight(form: str, *shape: int) -> Tensor | Quantized:
    """Random, drawn on the card."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    if form == "bfloat16":
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(std=shape[-1] ** -0.5)
    return random_quantized(form, 64 if form == "int4" else None, shape, generator)


def numbers(*shape: int) -> Tensor:
    """Normal ones."""
    return torch.randn(shape, device=DEVICE).bfloat16()


def cases(operation: str, form: str, tokens: int) -> Iterator[Case]:
    """What there is to try of one operation."""
    if operation == "linear":
        yield from _linear(form, tokens)
    elif operation in ("gate_up", "down"):
        yield _experts(operation, form, tokens)
    elif operation == "attend":
        yield from _attend(tokens)
    elif form not in FOUR_BITS:
        yield _vocabulary(operation, form, tokens)


def _linear(form: str, tokens: int) -> Iterator[Case]:
    """A layer's dense matrices, as they are merged; with a library's product as the tile of no rows."""
    for outputs, inputs in ((8192, 2816), (2816, 4096), (4224, 2816), (2816, 2112)):
        own = operand(weight(form, outputs, inputs))
        ready = linear.ready(numbers(tokens, inputs), own)
        inner = (own.span,) if own.span else (128,) if form == "fp8" else (64,)
        shapes = ((4, 2), (4, 3), (8, 2), (8, 3)) if form in FOUR_BITS else ((4, 4), (8, 4))

        def run(tile: Tile, own: Operand = own, ready: linear.Ready = ready) -> Any:
            if tile.rows:
                return linear.product(ready, own, torch.bfloat16, tile)
            return gpu.product(ready, own, torch.bfloat16)

        yield Case(
            f"linear {form} {outputs}x{inputs}, {tokens} rows", run, Tile(rows=0, columns=0),
            grid((64, 128, 256) if form in FOUR_BITS else (64, 128), (64, 128), inner, *shapes), own.data.nbytes,
        )  # fmt: skip


def _experts(operation: str, form: str, tokens: int) -> Case:
    count, width, hidden, k = CONFIG.num_experts, CONFIG.moe_intermediate_size, CONFIG.hidden_size, CONFIG.top_k_experts
    gate_up, down = weight(form, count, 2 * width, hidden), weight(form, count, hidden, width)
    x = numbers(tokens, hidden)
    _, chosen = torch.topk(torch.randn(tokens, count, device=DEVICE), k, dim=-1)
    order, offsets = plain.group(chosen, count)
    one, two = tiles.experts(tokens * k // count, operand(gate_up), operand(down))
    first, few = operation == "gate_up", tokens <= 256
    rows = (16, 32) if few else (64, 128)
    if form in FOUR_BITS:
        shapes = ((4, 2), (4, 3), (8, 2), (8, 3)) if few else ((4, 2), (8, 2), (8, 3))
        trials = grid(rows, (32, 64) if first else (64, 128), (256,), *shapes)
    elif first:
        trials = grid(rows, (64,), (128, 256) if form == "fp8" else (64, 128), (4, 3), (4, 4), (8, 3), (8, 4))
    elif form == "fp8":
        trials = grid(rows, (64, 128, 256), (64, 128, 256), (4, 3), (4, 4), (8, 3), (8, 4))
        trials = [t for t in trials if t.columns * t.inner <= 16384 and (t.columns > 64 or t.warps == 4)]
    else:
        trials = grid(rows, (64, 128), (64, 128), (4, 3), (4, 4), (8, 3), (8, 4))

    def run(tile: Tile) -> Tensor:
        pair = (tile, two) if first else (one, tile)
        return experts.expert_outputs(x, order, offsets, gate_up, down, tiles=pair)

    own = one if first else two
    return Case(f"{operation} {form}, {tokens} tokens", run, own, trials, gate_up.nbytes + down.nbytes)


@contextmanager
def taking(name: str, tile: Tile) -> Iterator[None]:
    """`tiles` takes another one for a while."""
    before = getattr(tiles, name)
    setattr(tiles, name, lambda *_, **__: tile)
    try:
        yield
    finally:
        setattr(tiles, name, before)


def _attend(tokens: int) -> Iterator[Case]:
    """Canvases behind prefixes; here `inner` of a tile is the number of parts that keys are split in."""
    for shape in dict.fromkeys(CONFIG.layers):
        for prefix in (1024,) if shape.sliding else (1024, 8192):
            yield _attend_after(shape, prefix, tokens)


def _attend_after(shape: AttentionShape, prefix: int, tokens: int) -> Case:
    length, plans = CONFIG.canvas_length, dict[Tile, attention.Plan]()
    canvases, count = tokens // length, prefix // length
    q, k, v = (numbers(tokens, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    pools = [numbers(canvases * count, shape.kv_heads, length, shape.head_dim) for _ in range(2)]
    lines = [list(range(n * count, (n + 1) * count)) for n in range(canvases)]
    plainly = operand(q.flatten(1))

    def run(tile: Tile) -> Any:
        with taking("attention", tile):
            if tile not in plans:
                plans[tile] = attention.plan(
                    [(prefix, length, False)] * canvases, lines, group=shape.heads // shape.kv_heads,
                    head_dim=shape.head_dim, kv_heads=shape.kv_heads,
                    window=CONFIG.sliding_window if shape.sliding else None, device=DEVICE, splits=tile.inner or None,
                )  # fmt: skip
            return attention.attend(q, k, v, *pools, plans[tile], plainly)

    splits = (1, 2, 4) if shape.sliding or tokens > 256 else (2, 4, 8)
    rows = (64, 128) if shape.sliding else (64,)
    kind = "sliding" if shape.sliding else "full"
    return Case(
        f"attend {kind} after {prefix}, {tokens} rows", run, tiles.attention(shape.head_dim),
        [*grid(rows, (32,), splits, (8, 2), (8, 3)), *grid(rows, (64,), splits, (8, 2))], sum(p.nbytes for p in pools),
    )  # fmt: skip


def _vocabulary(operation: str, form: str, tokens: int) -> Case:
    table, hidden = weight(form, CONFIG.vocab_size, CONFIG.hidden_size), numbers(tokens, CONFIG.hidden_size)
    heats, uniform = torch.full((tokens,), 0.8, device=DEVICE), torch.rand(tokens, device=DEVICE)
    soft = operation == "blend"
    name = "blend" if soft else "vocabulary"

    def run(tile: Tile) -> Any:
        with taking(name, tile):
            return vocabulary.step(hidden, table, heats=heats, cap=30.0, tolerance=2.0**-9, uniform=uniform, soft=soft)

    if soft:
        trials = [t for t in grid((128, 256), (128, 256), (64, 128), (8, 3), (8, 4)) if t.rows + t.columns < 512]
    else:
        inner = (64,) if form != "fp8" else (128,)
        trials = [t for t in grid((128, 256), (128, 256), inner, (8, 3), (8, 4)) if t.rows + t.columns < 512]
    own = tiles.blend(tokens) if soft else tiles.vocabulary(tokens, form)
    return Case(f"{operation} {form}, {tokens} positions", run, own, trials, table.nbytes * (2 if soft else 1))


def _compile(part: int, parts: int, asked: list[tuple[str, str, int]], end: float, done: Any) -> None:
    """Runs every so manieth tile of all cases once, and says which ones it can."""
    number = itertools.count()
    for what in asked:
        for case in cases(*what):
            for tile in [case.own, *case.trials]:
                if next(number) % parts == part and time.monotonic() < end:
                    try:
                        case.run(tile)
                        torch.cuda.synchronize()
                    except Exception as error:  # a tile that does not fit the card is no tile
                        sys.stderr.write(f"{case.name} {tile}: {str(error)[:100]}\n")
                    else:
                        done.put((case.name, tile))
        torch.cuda.empty_cache()
    done.put(None)


def compiled(asked: list[tuple[str, str, int]], processes: int, seconds: float) -> set[tuple[str, Tile]]:
    """What several processes could compile in time."""
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    end, found, over = time.monotonic() + seconds, set[tuple[str, Tile]](), 0
    running = [context.Process(target=_compile, args=(n, processes, asked, end, done)) for n in range(processes)]
    for process in running:
        process.start()
    while over < processes and time.monotonic() < end + 15:
        with suppress(queue.Empty):
            one = done.get(timeout=1)
            over += one is None
            if one is not None:
                found.add(one)
    for process in running:
        process.kill()
    return found


def _timed(case: Case, trials: list[Tile], end: float) -> list[tuple[float, Tile]]:
    return [(timed(partial(case.run, tile), DEVICE, 7), tile) for tile in trials if time.monotonic() < end]


def main() -> None:
    """Tries them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS), metavar="OPERATION")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fp8", "int4", "bfloat16"])
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    asked = [
        (operation, form, tokens)
        for tokens in options.tokens for operation in options.operations for form in options.forms
        if operation != "attend" or form == options.forms[0]
    ]  # fmt: skip
    can = compiled(asked, options.processes, options.seconds * 0.55)
    sys.stderr.write(f"{len(can)} compiled after {time.monotonic() + options.seconds - end:.0f} s\n")
    results, best = Results("gpu-tiles", {"asked": asked}, options.out), dict[str, dict[str, Any]]()
    for what in asked:
        for case in cases(*what):
            found = _timed(case, [tile for tile in [case.own, *case.trials] if (case.name, tile) in can], end)
            for seconds, tile in found:
                results.add(case=case.name, seconds=seconds, own=tile == case.own, **vars(tile))
            if found:
                found.sort(key=lambda pair: pair[0])
                own = next((seconds for seconds, tile in found if tile == case.own), float("nan"))
                told = "; ".join(
                    f"{s * 1e6:.0f} us {t.rows}x{t.columns}x{t.inner} w{t.warps} s{t.stages}" for s, t in found[:5]
                )
                rate = case.moved / found[0][0] / 1e9
                sys.stderr.write(f"{case.name}: now {own * 1e6:.0f} us; {told}; {rate:.0f} GB/s\n")
                best[case.name] = {"now_us": round(own * 1e6, 1), "best_us": round(found[0][0] * 1e6, 1)}
                best[case.name] |= vars(found[0][1])
        torch.cuda.empty_cache()
    lines = "\n".join(f"- {name}: {value}" for name, value in best.items())
    sys.stdout.write(results.close(f"# Tiles\n\n{lines}\n", {"best": best}) + "\n")


if __name__ == "__main__":
    main()
