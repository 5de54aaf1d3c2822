"""Requests for the GPU check: whole ones for an engine, and rows behind a prefix that nobody has encoded."""

from __future__ import annotations

from typing import Any

from gpu_weights import nbytes

from dgemma.config import ModelConfig
from dgemma.engine import Request, Ticket
from dgemma.engine.card import CardForward
from dgemma.engine.pages import Pages
from dgemma.engine.row import Row
from dgemma.model import Network
from dgemma.params import GenerationConfig, SamplingParams

NEVER = 1e-30  # a confidence that no canvas reaches: every one takes all of its steps


def ask(
    config: ModelConfig,
    prompt: list[int],
    *,
    seed: int,
    new: int,
    steps: int,
    mode: str = "diffusion",
    top_p: float = 1.0,
) -> Request:
    """A request whose canvases all take `steps` steps, and which nothing ends early."""
    params = SamplingParams(
        seed=seed,
        max_new_tokens=new,
        max_denoising_steps=steps,
        confidence_threshold=NEVER,
        mode=mode,
        top_p=top_p,
    )
    return Request(
        prompt=tuple(prompt),
        params=params,
        settings=params.resolve(GenerationConfig(eos_token_ids=())),
        canvas=config.canvas_length,
        limit=config.max_position_embeddings,
        seed=seed,
    )


def config_rows(config: ModelConfig, batch: int, limit: int) -> tuple[Pages, int]:
    """Pages of a canvas's length for so many requests of at most `limit` tokens, and the number of canvases."""
    size = config.canvas_length
    pages = Pages(size=size, window=config.sliding_window, full=0, sliding=0)
    sliding = batch * (pages.sliding_needed(size) + 1)
    return Pages(size=size, window=config.sliding_window, full=batch * -(-limit // size), sliding=sliding), batch


def rows_of(forward: CardForward, pages: Pages, batch: int, prefix: int) -> list[Row]:
    """Requests at their first canvas behind a prefix. What is cached of it is zeros, which costs the same time."""
    config, rows = forward.network.config, []
    for number in range(batch):
        request = ask(config, [1] * prefix, seed=number, new=config.canvas_length, steps=1 << 20)
        row = Row(request, ticket(prefix, number), None, config.vocab_size)
        row.enter(pages, reuse=False)
        table = row.table
        assert table is not None
        for start in range(0, prefix, pages.size):
            count = min(pages.size, prefix - start)
            forward.clear(table, count)
            for layer, shape in enumerate(config.layers):
                own = table.sliding[-1:] if shape.sliding else table.full[-1:]
                forward.store.keys[layer][own] = 0.0
            table.advance(row.history, count)
        rows.append(row)
    return rows


def floor_bytes(network: Network, batch: int, prefix: int) -> int:
    """What a step must read: all weights, the table twice, and what is cached of each request."""
    config = network.config
    table = network.embed_tokens.weight
    cached = 0
    for shape in config.layers:
        seen = min(prefix, config.sliding_window - 1) if shape.sliding else prefix
        cached += 2 * seen * shape.kv_heads * shape.head_dim * network.dtype.itemsize
    return nbytes(network) + table.nbytes + batch * cached


def ticket(tokens: int, seed: int) -> Ticket:
    def nothing(*_: Any) -> bool:
        return False

    return Ticket(prompt_tokens=tokens, seed=seed, drive=nothing, ensure_thread=nothing, cancel=nothing)  # type: ignore[arg-type]


def finish(ticket: Any) -> tuple[list[int], int]:
    """Tokens of a request, and how many."""
    result = list(ticket)[-1].result
    return result.tokens, len(result.tokens)
