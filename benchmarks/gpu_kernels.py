"""Each kernel on this card against its twin in plain torch, and beside the library's at the sizes of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_weights import FORMS, random_quantized
from torch import Tensor
from torch.nn import functional as F

from dgemma.config import AttentionShape, ModelConfig
from dgemma.kernels import gpu, plain, reference
from dgemma.kernels.triton import attention, experts, layer, routing, vocabulary
from dgemma.kernels.triton.common import operand
from dgemma.kernels.wish import Wish
from dgemma.model.norm import RMSNorm
from dgemma.model.rope import inverse_frequencies, rotate, rotation
from dgemma.quant import Quantized, quantize

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}  # of the largest number, where both sum in float32
FP8_TOLERANCE = 2**-4  # a middle that is rounded on the other side of a step of FP8


@dataclass(kw_only=True)
class Case:
    """One operation at one size.

    Fields:
        ours, twin: give the same tensors; the twin in plain torch.
        library: what a library has for it, for the time alone; None where it has nothing.
        moved: bytes that must be read.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    twin: Callable[[], tuple[Tensor, ...]]
    library: Callable[[], Any] | None = None
    moved: int = 0
    tolerance: float


def timed(run: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Seconds, the median; on a card with cold caches and by its own clock, as a graph where it can be one: what the
    host takes to launch is not in it."""
    run()
    seconds = []
    if device.type != "cuda":
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
    run = recorded(run)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(repeats + 1):
        flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return statistics.median(seconds[1:])


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of what it does on the card; itself where it waits for the card."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return lambda: (graph.replay(), kept)


def gap(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest difference, as a share of the largest number."""
    worst = 0.0
    for own, right in zip(found, wanted, strict=True):
        difference = (own.float() - right.float()).abs().max()
        worst = max(worst, float(difference / right.float().abs().max().clamp_min(1e-6)))
    return worst


class Maker:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def numbers(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal ones."""
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def weight(self, form: str, *shape: int) -> Tensor | Quantized:
        """A weight of about 1 / sqrt(inputs)."""
        if form == "nvfp4":
            return random_quantized(form, None, shape, self.generator)
        values = self.numbers(*shape, scale=shape[-1] ** -0.5)
        if form == "bfloat16":
            return values
        if form == "fp8":
            scales = values.float().abs().amax(dim=-1, keepdim=True) / 448.0
            return Quantized(bits=8, group=None, data=(values.float() / scales).to(torch.float8_e4m3fn), scales=scales)
        group = None if form == "int8" else 64 if shape[-1] % 64 == 0 else 32
        return quantize(values.float(), bits=int(form[3:]), group=group, search=False)


def cases(config: ModelConfig, make: Maker, canvases: int) -> list[Callable[[], Iterator[Case]]]:
    """Every kernel at a step's sizes, for some canvases at once; each call draws what its cases need."""
    hidden = config.hidden_size
    tolerance = TOLERANCE[make.dtype]
    x = make.numbers(canvases * config.canvas_length, hidden)
    found: list[Callable[[], Iterator[Case]]] = []
    for form in FORMS:
        own = FP8_TOLERANCE if form == "fp8" else tolerance
        found.append(partial(_linear, make, form, x, 4096 if hidden > 1000 else 48, own))
        found.append(partial(_experts, config, make, form, x, own))
    found.append(partial(_layer, config, make, x, tolerance))
    found += [partial(_attention, config, shape, make, canvases, tolerance) for shape in dict.fromkeys(config.layers)]
    return found + [partial(_vocabulary, config, make, form, x) for form in FORMS[:3]]


def _linear(make: Maker, form: str, x: Tensor, outputs: int, tolerance: float) -> Iterator[Case]:
    weight = make.weight(form, outputs, x.shape[1])
    dense = make.weight("bfloat16", outputs, x.shape[1])
    yield Case(
        name=f"linear {form}, {len(x)} rows",
        ours=lambda: (gpu.linear(x, weight),),
        twin=lambda: (plain.linear(x, weight),),
        library=lambda: F.linear(x, dense),
        moved=weight.nbytes,
        tolerance=tolerance,
    )


def _experts(config: ModelConfig, make: Maker, form: str, x: Tensor, tolerance: float) -> Iterator[Case]:
    count, k, width = config.num_experts, config.top_k_experts, config.moe_intermediate_size
    gate_up = make.weight(form, count, 2 * width, x.shape[1])
    down = make.weight(form, count, x.shape[1], width)
    weights, chosen = torch.topk(make.numbers(len(x), count).float().softmax(dim=-1), k, dim=-1)
    order, offsets = plain.group(chosen, count)
    library = None
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and hasattr(torch, "_grouped_mm"):
        rows, ends = x[order.long() // k], offsets[1:]

        def library() -> Tensor:
            gates, up = torch._grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
            return torch._grouped_mm(F.gelu(gates, approximate="tanh") * up, down.mT, offs=ends)

    yield Case(
        name=f"experts {form}, {len(x)} rows",
        ours=lambda: (experts.weighted_sum(experts.expert_outputs(x, order, offsets, gate_up, down), weights),),
        twin=lambda: (plain.experts(x, weights, chosen, gate_up, down),),
        library=library,
        moved=gate_up.nbytes + down.nbytes,
        tolerance=tolerance,
    )


def _layer(config: ModelConfig, make: Maker, x: Tensor, tolerance: float) -> Iterator[Case]:
    """Routing, and what lies between products."""
    tokens, hidden, eps = len(x), config.hidden_size, config.rms_norm_eps
    scores, scale = make.numbers(tokens, config.num_experts), make.numbers(config.num_experts).abs()

    def routed() -> tuple[Tensor, ...]:
        weights, chosen = torch.topk(torch.softmax(scores.float(), dim=-1), config.top_k_experts, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * scale[chosen]
        return (torch.zeros(tokens, config.num_experts, device=x.device).scatter(1, chosen, weights),)

    def route() -> tuple[Tensor, ...]:
        way = routing.route(scores, config.top_k_experts, scale)
        return (torch.zeros(tokens, config.num_experts, device=x.device).scatter(1, way.experts, way.weights),)

    # Equally likely experts in bfloat16 are the exception to an equal choice: none is drawn here with a fixed seed.
    yield Case(name="route", ours=route, twin=routed, library=routed, tolerance=1e-5)
    norms = [make.numbers(hidden) for _ in range(8)]
    residual, dense = make.numbers(tokens, hidden), make.numbers(tokens, hidden)
    room = make.numbers(tokens, config.top_k_experts, hidden)
    weights, scalars = make.numbers(tokens, config.top_k_experts, dtype=torch.float32).softmax(dim=-1), norms[7][:1]

    def rms(values: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(values.float(), (hidden,), weight.float(), eps)

    def entered() -> tuple[Tensor, ...]:
        h = residual.float() + rms(x, norms[0])
        return h, rms(h, norms[1]), rms(h, norms[2]), rms(h, norms[3]) * hidden**-0.5

    def left() -> tuple[Tensor, ...]:
        mixed = (room.float() * weights[..., None]).sum(dim=1)
        out = residual.float() + rms(rms(dense, norms[4]) + rms(mixed, norms[5]), norms[6])
        return out * scalars.float(), rms(out * scalars.float(), norms[0])

    each, plainly = (scalars.expand(2).contiguous(), 0), operand(x)

    def entering() -> tuple[Tensor, ...]:
        h, dense, mixed, routed = layer.enter(x, residual, norms[0], norms[1:4], eps, (plainly, plainly))
        return h, dense.values, mixed.values, routed

    def leaving() -> tuple[Tensor, ...]:
        out, normed = layer.leave(residual, dense, room, weights, norms[4:7], each, norms[0], eps, plainly)
        return out, normed.values

    yield Case(
        name="enter",
        ours=entering,
        twin=entered,
        library=entered,
        moved=5 * x.nbytes,
        tolerance=tolerance,
    )
    yield Case(
        name="leave",
        ours=leaving,
        twin=left,
        library=left,
        moved=room.nbytes + 4 * x.nbytes,
        tolerance=tolerance,
    )


def _attention(
    config: ModelConfig, shape: AttentionShape, make: Maker, canvases: int, tolerance: float
) -> Iterator[Case]:
    """Head norms and rotary; canvases behind prefixes of several lengths, and a prompt, beside SDPA on one piece."""
    length, size = config.canvas_length, config.canvas_length
    kind = "sliding" if shape.sliding else "full"
    window = config.sliding_window if shape.sliding else None
    tokens = canvases * length
    queries = make.numbers(tokens, shape.heads, shape.head_dim, scale=shape.head_dim**-0.25)
    keys = make.numbers(tokens, shape.kv_heads, shape.head_dim, scale=shape.head_dim**-0.25)
    values = make.numbers(tokens, shape.kv_heads, shape.head_dim)
    norms = make.numbers(shape.head_dim), make.numbers(shape.head_dim)
    turn = rotation(torch.arange(tokens, device=make.device), shape, make.dtype)
    flat = layer.turns(torch.arange(tokens, device=make.device), inverse_frequencies(shape, make.device), make.dtype)
    projected, plainly = (
        torch.cat([part.flatten(1) for part in (queries, keys, values)], dim=1),
        operand(queries.flatten(1)),
    )

    def rms(x: Tensor, weight: Tensor | None) -> Tensor:
        own = RMSNorm(shape.head_dim, config.rms_norm_eps, scaled=weight is not None)
        if weight is not None:
            own.weight = torch.nn.Parameter(weight, requires_grad=False)
        return own(x)

    nowhere = torch.full((tokens,), -1, device=make.device)
    pool = torch.zeros(1, shape.kv_heads, size, shape.head_dim, dtype=make.dtype, device=make.device)

    def twin() -> tuple[Tensor, ...]:
        return rotate(rms(queries, norms[0]), turn), rotate(rms(keys, norms[1]), turn), rms(values, None)

    yield Case(
        name=f"heads, {kind}",
        ours=lambda: layer.heads(
            projected, shape.heads, *norms, flat, config.rms_norm_eps, slots=nowhere, pool=(pool, pool)
        ),
        twin=twin,
        library=twin,
        moved=2 * (queries.nbytes + 2 * keys.nbytes),
        tolerance=2 * tolerance,
    )  # fmt: skip
    for prefix in (length, 4 * length, 32 * length):
        count = prefix // size
        pools = [make.numbers(canvases * count, shape.kv_heads, size, shape.head_dim) for _ in range(2)]
        lines = [list(range(n * count, (n + 1) * count)) for n in range(canvases)]
        laid = attention.plan(
            [(prefix, length, False)] * canvases, lines, group=shape.heads // shape.kv_heads,
            head_dim=shape.head_dim, kv_heads=shape.kv_heads, window=window, device=make.device,
        )  # fmt: skip
        seen = prefix if window is None else min(prefix, window - 1)

        def whole(pool: Tensor, own: Tensor, seen: int = seen, count: int = count) -> Tensor:
            """[canvases, kv_heads, seen + length, D]."""
            pages = pool.view(canvases, count, *pool.shape[1:]).transpose(1, 2).flatten(2, 3)
            fresh = own.view(canvases, length, *own.shape[1:]).transpose(1, 2)
            return torch.cat([pages[:, :, pages.shape[2] - seen :], fresh], dim=2)

        asked = queries.view(canvases, length, *queries.shape[1:]).transpose(1, 2)
        known, held = whole(pools[0], keys).contiguous(), whole(pools[1], values).contiguous()

        def sdpa(asked: Tensor = asked, known: Tensor = known, held: Tensor = held) -> tuple[Tensor, ...]:
            out = F.scaled_dot_product_attention(asked, known, held, scale=1.0, enable_gqa=True)
            return (out.transpose(1, 2).flatten(0, 1).flatten(1),)

        yield Case(
            name=f"attend, {kind}, prefix {prefix}",
            ours=lambda laid=laid, pools=pools: attention.attend(queries, keys, values, *pools, laid, plainly)[:1],
            twin=sdpa,
            library=sdpa,
            moved=known.nbytes + held.nbytes,
            tolerance=tolerance,
        )


def _vocabulary(config: ModelConfig, make: Maker, form: str, x: Tensor) -> Iterator[Case]:
    table = make.weight(form, config.vocab_size, config.hidden_size)
    wish = Wish(heat=0.8, cap=config.final_logit_softcapping)
    rows = x[: config.canvas_length]
    uniform = torch.rand(len(rows), generator=make.generator, device=make.device)
    heats = torch.full((len(rows),), wish.heat, device=make.device)

    def ours() -> tuple[Tensor, ...]:
        step = vocabulary.step(rows, table, heats=heats, cap=wish.cap, tolerance=2.0**-9, uniform=uniform)
        assert step.soft is not None
        return step.found.entropies, step.soft

    def twin() -> tuple[Tensor, ...]:
        found, soft = [], []
        for part in rows.split(64):
            scores = plain.linear(part, table).float()
            belief, weights, totals = reference.read(scores, wish, None)
            entries = table if isinstance(table, Tensor) else table.dequantize().to(part.dtype)
            found.append(belief.entropies)
            soft.append(((weights / totals).to(part.dtype) @ entries).float())
        return torch.cat(found), torch.cat(soft)

    yield Case(
        name=f"vocabulary {form}",
        ours=ours,
        twin=twin,
        library=twin,
        moved=2 * table.nbytes,
        tolerance=FP8_TOLERANCE if form == "fp8" else 2 * TOLERANCE[make.dtype],
    )
