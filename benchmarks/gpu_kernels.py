"""Each kernel on this card against its twin in plain torch, and beside the library's at the sizes of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_case import FP8_TOLERANCE, TOLERANCE, Case, Maker
from gpu_sampling import begin, sampling
from gpu_weights import FORMS
from torch import Tensor
from torch.nn import functional as F

from dgemma.config import AttentionShape, ModelConfig
from dgemma.diffusion.sampling import keep_likely
from dgemma.kernels import gpu, plain, reference
from dgemma.kernels.triton import attention, experts, layer, routing, vocabulary
from dgemma.kernels.triton.common import operand
from dgemma.kernels.wish import Wish
from dgemma.model.norm import RMSNorm
from dgemma.model.rope import inverse_frequencies, rotate, rotation

TOP_P = 0.9


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
    found.append(partial(sampling, config, make, canvases))
    found.append(partial(begin, config, make, canvases, tolerance))
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

    def ours(likely: Tensor | None = None) -> tuple[Tensor, ...]:
        step = vocabulary.step(
            rows, table, heats=heats, cap=wish.cap, tolerance=2.0**-9, uniform=uniform, likely=likely
        )
        assert step.soft is not None
        return step.found.entropies, step.soft

    def twin(top_p: float = 1.0) -> tuple[Tensor, ...]:
        found, soft = [], []
        for part in rows.split(64):
            scores = keep_likely(wish.process(plain.linear(part, table).float()), None, top_p)
            belief, weights, totals = reference.read(scores, Wish(heat=1.0), None)
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
    if form == FORMS[0]:
        likely = torch.tensor([(0, TOP_P, 0)] * len(rows), device=make.device)
        most = partial(twin, TOP_P)
        yield Case(
            name="vocabulary, likely words", ours=partial(ours, likely), twin=most, library=most,
            moved=2 * table.nbytes, tolerance=4 * TOLERANCE[make.dtype],
        )  # fmt: skip
