"""Routing in one launch: softmax over experts, the k best, their weights, and the tokens in order of their experts.

Each program has some tokens. It writes their experts and weights, how many of its tokens chose each expert, and each
assignment's rank among those. The program that is done last (a counter says so) adds the programs' counts up to where
each expert's assignments begin and puts every assignment in its place: a counting sort, stable, in one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import power

TOKENS = 16  # of a program


class Routing(NamedTuple):
    """Who goes where.

    Fields:
        weights: float32 [T, k].
        experts: int64 [T, k], likeliest first.
        order: int32 [T * k], assignments (`token * k + choice`) sorted by expert, then by number.
        offsets: int32 [E + 1], where in `order` each expert's begin.
    """

    weights: Tensor
    experts: Tensor
    order: Tensor
    offsets: Tensor


@triton.jit
def _route_kernel(
    scores, expert_scale, weights, experts, ranks, counts, ticket, order, offsets, T, E, k,
    BT: tl.constexpr, PADDED: tl.constexpr, PROGRAMS: tl.constexpr, SPOTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tokens, lanes = pid * BT + tl.arange(0, BT), tl.arange(0, PADDED)
    seen, real = tokens < T, lanes < E
    there = tokens.to(tl.int64)[:, None] * E + lanes[None, :]
    score = tl.load(scores + there, mask=seen[:, None] & real[None, :], other=float("-inf")).to(tl.float32)
    # Rows that are not there, and a failed request's that are no numbers, go somewhere: every assignment has a place.
    score = tl.where(seen[:, None] & (score == score) & (score != float("inf")), score, 0.0)
    score = tl.where(real[None, :], score, float("-inf"))
    likely = tl.exp(score - tl.max(score, 1)[:, None])
    likely = likely / tl.sum(likely, 1)[:, None]

    left = tl.where(real[None, :], likely, -1.0)
    choice = tl.full((BT, PADDED), -1, tl.int32)  # which choice of its token an expert is
    total = tl.zeros((BT,), tl.float32)
    for number in range(k):
        best = tl.max(left, 1)
        chosen = tl.min(tl.where(left == best[:, None], lanes[None, :], PADDED), 1)
        mine = lanes[None, :] == chosen[:, None]
        choice = tl.where(mine, number, choice)
        left = tl.where(mine, -2.0, left)
        total += best
    own = (choice >= 0) & seen[:, None]
    scale = tl.load(expert_scale + lanes, mask=real, other=0.0).to(tl.float32)
    there = tokens[:, None] * k + choice
    tl.store(weights + there, likely / total[:, None] * scale[None, :], mask=own)
    tl.store(experts + there, tl.broadcast_to(lanes[None, :], (BT, PADDED)).to(tl.int64), mask=own)
    ones = own.to(tl.int32)
    tl.store(ranks + there, tl.cumsum(ones, 0) - ones, mask=own)
    tl.store(counts + pid * PADDED + lanes, tl.sum(ones, 0))

    tl.debug_barrier()  # every thread's writes come before this program's word that it is done
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        programs = tl.arange(0, PROGRAMS)
        table = counts + programs[:, None] * PADDED + lanes[None, :]
        each = tl.load(table, mask=(programs < tl.num_programs(0))[:, None], other=0, cache_modifier=".cg")
        sums = tl.sum(each, 0)
        begins = tl.cumsum(sums, 0) - sums
        tl.store(offsets + lanes, begins, mask=real)
        tl.store(offsets + E, T * k)
        tl.store(table, tl.cumsum(each, 0) - each + begins[None, :], mask=(programs < tl.num_programs(0))[:, None])
        tl.store(ticket, 0)  # for the next launch
        tl.debug_barrier()
        for first in range(0, T * k, SPOTS):
            spot = first + tl.arange(0, SPOTS)
            inside = spot < T * k
            expert = tl.load(experts + spot, mask=inside, other=0, cache_modifier=".cg")
            rank = tl.load(ranks + spot, mask=inside, other=0, cache_modifier=".cg")
            start = tl.load(counts + spot // k // BT * PADDED + expert, mask=inside, other=0, cache_modifier=".cg")
            tl.store(order + start + rank, spot, mask=inside)


_tickets: dict[torch.device, Tensor] = {}


def route(scores: Tensor, k: int, expert_scale: Tensor) -> Routing:
    """Router scores [T, E] -> the k likeliest experts of each token, renormalised and scaled.

    Among equally likely experts the first is taken (torch leaves open which). A score that is no number counts as 0, so
    that a failed request's rows disturb nobody's. Launches on one device share a counter,
    so they belong on one stream.

    Args:
        scores: [T, E] of any float dtype; softmax is computed in float32.
        k: 1..E.
        expert_scale: [E], what an expert's weight is multiplied with after the k weights were made to sum to 1.
    """
    tokens, count = scores.shape
    device = scores.device
    programs, padded = max(1, triton.cdiv(tokens, TOKENS)), power(count)
    out = Routing(
        weights=torch.empty(tokens, k, device=device),
        experts=torch.empty(tokens, k, dtype=torch.int64, device=device),
        order=torch.empty(tokens * k, dtype=torch.int32, device=device),
        offsets=torch.empty(count + 1, dtype=torch.int32, device=device),
    )
    ranks = torch.empty_like(out.order)
    counts = torch.empty(programs, padded, dtype=torch.int32, device=device)
    if device not in _tickets:
        _tickets[device] = torch.zeros(1, dtype=torch.int32, device=device)
    _route_kernel[(programs,)](
        scores.contiguous(), expert_scale, out.weights, out.experts, ranks, counts, _tickets[device], out.order,
        out.offsets, tokens, count, k,
        BT=TOKENS, PADDED=padded, PROGRAMS=power(programs), SPOTS=min(4096, power(tokens * k)), num_warps=8,
    )  # fmt: skip
    return out
