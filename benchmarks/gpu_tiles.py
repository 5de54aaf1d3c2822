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
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import torch
from gpu_kernels import timed
from gpu_weights import config_of, random_quantized
from record import Results
from torch import Tensor

from dgemma.kernels import plain
from dgemma.kernels.triton import attention, experts, linear, tiles, vocabulary
from dgemma.kernels.triton.tiles import Tile
from dgemma.quant import Quantized

CONFIG = config_of(6, tiny=False)
DEVICE = torch.device("cuda")
OPERATIONS = ("linear", "gate_up", "down", "attend", "scores", "blend")
FORMS = ("fp8", "int4", "int8", "bfloat16")


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


def grid(
    rows: tuple[int, ...], columns: tuple[int, ...], inner: tuple[int, ...], *shapes: tuple[int, int]
) -> list[Tile]:
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
    bits, group = (4, 64) if form == "int4" else (8, None)
    return random_quantized(bits, group, form == "fp8", shape, generator)


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
    elif form != "int4":
        yield _vocabulary(operation, form, tokens)


def _linear(form: str, tokens: int) -> Iterator[Case]:
    for outputs, inputs in ((4096, 2816), (2112, 2816), (2816, 4096)):
        x, own = numbers(tokens, inputs), weight(form, outputs, inputs)
        taken = tiles.product(tokens, form, 64 if form == "int4" else 0, outputs)
        inner = (64,) if form == "int4" else (128, 256) if form == "fp8" else (64, 128)
        trials = grid((64, 128), (64, 128), inner, (4, 3), (4, 4), (8, 3), (8, 4))
        ready = linear.activations(x, linear.operand(own))
        yield Case(
            f"linear {form} {outputs}x{inputs}, {tokens} rows",
            lambda tile, x=x, own=own, ready=ready: linear.linear(x, own, tile=tile, ready=ready),
            taken, trials, own.nbytes,
        )  # fmt: skip


def _experts(operation: str, form: str, tokens: int) -> Case:
    count, width, hidden, k = CONFIG.num_experts, CONFIG.moe_intermediate_size, CONFIG.hidden_size, CONFIG.top_k_experts
    gate_up, down = weight(form, count, 2 * width, hidden), weight(form, count, hidden, width)
    x = numbers(tokens, hidden)
    _, chosen = torch.topk(torch.randn(tokens, count, device=DEVICE), k, dim=-1)
    order, offsets = plain.group(chosen, count)
    one, two = experts._tiles(tokens * k // count, linear.operand(gate_up), linear.operand(down))
    rows = (16, 32) if tokens <= 256 else (64, 128)
    shapes = ((4, 3), (4, 4), (4, 6), (8, 3), (8, 4))
    if operation == "gate_up":
        inner = {"fp8": (128, 256), "int4": (64,)}.get(form, (64, 128))
        columns = (64,) if form == "fp8" else (32, 64)
    else:
        inner = {"fp8": (64,), "int4": (64,)}.get(form, (64, 128))
        columns = (64, 128)
    first = operation == "gate_up"

    def run(tile: Tile) -> Tensor:
        pair = (tile, two) if first else (one, tile)
        return experts.expert_outputs(x, order, offsets, gate_up, down, tiles=pair)

    return Case(
        f"{operation} {form}, {tokens} tokens", run, one if first else two, grid(rows, columns, inner, *shapes),
        gate_up.nbytes + down.nbytes,
    )  # fmt: skip


@contextmanager
def taking(name: str, tile: Tile) -> Iterator[None]:
    """`tiles` takes another one for a while."""
    before = getattr(tiles, name)
    setattr(tiles, name, lambda *_: tile)
    try:
        yield
    finally:
        setattr(tiles, name, before)


def _attend(tokens: int) -> Iterator[Case]:
    length = CONFIG.canvas_length
    canvases = tokens // length
    for shape in dict.fromkeys(CONFIG.layers):
        window = CONFIG.sliding_window if shape.sliding else None
        q, k, v = (numbers(tokens, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        for prefix in (1024,) if shape.sliding else (1024, 8192):
            count = prefix // length
            pools = [numbers(canvases * count, shape.kv_heads, length, shape.head_dim) for _ in range(2)]
            lines = [list(range(n * count, (n + 1) * count)) for n in range(canvases)]

            def run(
                tile: Tile, *, shape=shape, prefix=prefix, q=q, k=k, v=v, pools=pools, lines=lines, window=window
            ) -> Any:
                with taking("attention", tile):
                    laid = plans.get((shape, prefix, tile))
                    if laid is None:
                        laid = plans[shape, prefix, tile] = attention.plan(
                            [(prefix, length, False)] * canvases, lines, group=shape.heads // shape.kv_heads,
                            head_dim=shape.head_dim, kv_heads=shape.kv_heads, window=window, device=DEVICE,
                            splits=tile.inner or None,
                        )  # fmt: skip
                    return attention.attend(q, k, v, *pools, laid)

            plans: dict[Any, attention.Plan] = {}
            rows = (64, 128) if shape.head_dim > 256 else (64, 128)
            trials = grid(rows, (32, 64), (1, 4), (4, 2), (8, 2))
            yield Case(
                f"attend {'sliding' if shape.sliding else 'full'} after {prefix}, {tokens} rows", run,
                tiles.attention(shape.head_dim), trials, sum(p.nbytes for p in pools),
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
        trials = grid((128, 256), (128,), (64, 128, 256), (4, 3), (8, 2), (8, 3))
    else:
        inner = (64, 128) if form != "fp8" else (128,)
        trials = grid((128, 256), (128, 256), inner, (4, 3), (8, 3), (8, 4))
    own = tiles.blend(tokens) if soft else tiles.vocabulary(tokens)
    return Case(f"{operation} {form}, {tokens} positions", run, own, trials, table.nbytes * (2 if soft else 1))


def _compile(part: int, parts: int, asked: list[tuple[str, str, int]]) -> None:
    number = itertools.count()
    for what in asked:
        for case in cases(*what):
            for tile in [case.own, *case.trials]:
                if next(number) % parts == part:
                    with _forgiven():
                        case.run(tile)
                        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def _forgiven() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a tile that does not fit the card is no tile
        if "illegal" in str(error):
            raise


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
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_compile, args=(n, options.processes, asked)) for n in range(options.processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.stderr.write(f"compiled after {time.monotonic() + options.seconds - end:.0f} s\n")
    results, best = Results("gpu-tiles", {"asked": asked}, options.out), {}
    for what in asked:
        if time.monotonic() > end:
            sys.stderr.write(f"no time for {what}\n")
            continue
        for case in cases(*what):
            found = []
            for tile in [case.own, *case.trials]:
                with _forgiven():
                    found.append((timed(lambda tile=tile: case.run(tile), DEVICE, 7), tile))
                    results.add(case=case.name, seconds=found[-1][0], own=len(found) == 1, **vars(tile))
            own = found[0][0]
            found.sort(key=lambda pair: pair[0])
            told = "; ".join(
                f"{s * 1e6:.0f} us {t.rows}x{t.columns}x{t.inner} w{t.warps} s{t.stages}" for s, t in found[:4]
            )
            rate = case.moved / found[0][0] / 1e9
            sys.stderr.write(f"{case.name}: now {own * 1e6:.0f} us; {told}; {rate:.0f} GB/s\n")
            best[case.name] = {
                "now_us": round(own * 1e6, 1),
                "best_us": round(found[0][0] * 1e6, 1),
                **vars(found[0][1]),
            }
        torch.cuda.empty_cache()
    lines = "\n".join(f"- {name}: {value}" for name, value in best.items())
    sys.stdout.write(results.close(f"# Tiles\n\n{lines}\n", {"best": best}) + "\n")


if __name__ == "__main__":
    main()
