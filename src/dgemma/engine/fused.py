"""The network's layers on a GPU: a forward of many requests in about sixteen launches a layer, laid out once for all.

The arithmetic is that of `model/`; what differs is where it is rounded (`kernels/triton`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels import gpu
from ..kernels.triton import attention, layer, routing
from ..kernels.triton.common import Operand, operand
from ..kernels.triton.experts import expert_outputs, weighted_sum
from ..kernels.triton.linear import Ready
from ..model import Mode, Network
from ..model.block import Block
from ..model.linear import Linear
from ..model.moe import Experts
from ..model.norm import RMSNorm
from ..model.rope import Rotation, inverse_frequencies
from ..quant import Quantized
from .ragged import Segment, Store


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the rows of a forward belong; rows that are encoded come first.

    Fields:
        encoded: how many of the rows are encoded.
        positions: int64 [T].
        slots: by kind of layer (True: sliding), int64 [T]: the place in the pages that a row's key and value go to,
            `page * P + place`, or -1.
        plans: by kind, who sees what.
    """

    encoded: int
    positions: Tensor
    slots: dict[bool, Tensor]
    plans: dict[bool, attention.Plan]

    @property
    def splits(self) -> tuple[int, int]:
        """Parts that keys are split in, by kind."""
        return self.plans[False].splits, self.plans[True].splits

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        plans = [t for plan in self.plans.values() for t in (plan.segments, plan.blocks, plan.pages)]
        return [self.positions, *self.slots.values(), *plans]

    def like(self, tensors: Iterator[Tensor]) -> Layout:
        """The same with the next of other tensors, in that order."""
        return Layout(
            encoded=self.encoded,
            positions=next(tensors),
            slots={kind: next(tensors) for kind in self.slots},
            plans={
                kind: replace(plan, segments=next(tensors), blocks=next(tensors), pages=next(tensors))
                for kind, plan in self.plans.items()
            },
        )


def lay_out(
    segments: Sequence[Segment],
    config: ModelConfig,
    page: int,
    *,
    encoded: int,
    rooms: Sequence[int],
    columns: int = 1,
    size: int = 2,
) -> Layout:
    """A forward over segments, on the host.

    Args:
        page: tokens of a page.
        encoded: how many of the rows are encoded or their fill; they come first.
        rooms: rows of each segment, its tokens first.
        columns: pages that there is room for at least in each request's line.
        size: bytes of a key's number.
    """
    spans = [(s.start, s.length, s.mode is Mode.ENCODE) for s in segments]
    starts, lengths, encodes = np.array(spans).T
    whose, spots = attention.unroll(np.array(rooms))
    positions = starts[whose] + spots
    real = (encodes[whose] != 0) & (spots < lengths[whose])
    slots, plans = {}, {}
    for sliding in (False, True):
        shape = next((s for s in config.layers if s.sliding is sliding), config.layers[0])
        plans[sliding] = plan = attention.plan(
            spans,
            [s.table.lines[sliding] for s in segments],
            group=shape.heads // shape.kv_heads,
            head_dim=shape.head_dim,
            kv_heads=shape.kv_heads,
            window=config.sliding_window if sliding else None,
            device="cpu",
            rooms=rooms,
            columns=columns,
            size=size,
        )
        pages = plan.pages.numpy()[whose, np.minimum(positions // page, plan.pages.shape[1] - 1)].astype(np.int64)
        slots[sliding] = torch.from_numpy(np.where(real, pages * page + positions % page, -1))
    return Layout(encoded=encoded, positions=torch.from_numpy(positions), slots=slots, plans=plans)


class Aside:
    """A second stream, for work that the first one need not wait for; without CUDA it is done at once.

    Memory of either stream is used by the other one between `fork` and `join` alone, and must be held until `join`.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched within runs beside what the first stream is given from here on."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The first stream goes on when the second one is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Layer(NamedTuple):
    """A layer's matrices as kernels take them; those that meet the same activations are one. Of `experts`, the first
    matrices, only the form is looked at: they may be in host memory.
    """

    projections: Operand
    output: Operand
    gate_up: Operand
    down: Operand
    experts: Operand


class Fused:
    """The network's forward through the kernels; `gpu.missing` says whether they take all of its weights.

    The network's own matrices of queries, keys and values become views of one, and so do gate and up.
    """

    def __init__(self, network: Network, store: Store):
        self.network, self.store = network, store
        self.eps = network.config.rms_norm_eps
        self._ranks = network.ranks
        self._blocks = [block for block in network.layers if isinstance(block, Block)]
        scalars = [(block.encode_scalar.data, block.denoise_scalar.data) for block in self._blocks]
        self._scalars = torch.stack([torch.cat(pair) for pair in scalars])
        self._layers = [self._layer(block) for block in self._blocks]
        own = network.self_conditioning
        self._conditioning = operand(merged(own.gate_proj, own.up_proj)), operand(own.down_proj.weight)
        self._scale = float(network.embedding_scale())
        angles = {shape: inverse_frequencies(shape, network.device) for shape in dict.fromkeys(network.config.layers)}
        self._shapes, self._angles = list(angles), torch.cat(list(angles.values()))
        self._aside = Aside(network.device)

    def begin(self, tokens: Tensor, spots: Tensor, canvases: Tensor, soft: Tensor) -> Tensor:
        """The first layer's input [T, H]: of tokens that are encoded, int64 [E], and behind them of those of canvases
        (`SelfConditioning`): int64 [D], where in `canvases` [P, L] and `soft` [P, L, H] their tokens and soft
        embeddings are.
        """
        gate_up, down = self._conditioning
        norm = _scale(self.network.self_conditioning.pre_norm)
        table = operand(self.network.embed_tokens.weight)
        first = 0 if self._ranks is None else self._ranks.words[0]
        x, normed = layer.embed(table, self._scale, tokens, spots, canvases, soft, norm, self.eps, gate_up, first)
        x = self._added(x)
        if len(spots):
            layer.condition(x[len(tokens) :], self._added(self._mlp(gate_up, down, normed)), self.eps)
        return x

    def run(self, x: Tensor, layout: Layout) -> Tensor:
        """All layers and the final norm: [T, H] -> [T, H]."""
        blocks, layers, dtype = self._blocks, self._layers, x.dtype
        if self.network.expert_stream is not None:
            self.network.expert_stream.begin()
        turned = layer.turns(layout.positions, self._angles, dtype)
        widths = [shape.head_dim // 2 for shape in self._shapes]
        turns = dict(zip(self._shapes, zip(*(part.split(widths, dim=1) for part in turned), strict=True), strict=True))
        norms = [_scale(block.input_layernorm) for block in blocks] + [_scale(self.network.norm)]
        firsts = [*(own.projections for own in layers), operand(x)]  # what comes behind the last layer takes all as is
        normed = layer.norm(x, norms[0], self.eps, firsts[0])
        for index, (block, own) in enumerate(zip(blocks, layers, strict=True)):
            seen = self._attend(index, own, normed, layout, turns[block.self_attn.shape], dtype)
            before = _scale(block.pre_feedforward_layernorm), _scale(block.pre_feedforward_layernorm_2)
            norm, following = _scale(block.post_attention_layernorm), (own.gate_up, own.experts)
            h, dense, mixed, routed = layer.enter(seen, x, norm, (*before, block.router.scale), self.eps, following)
            with self._aside.fork():
                beside = self._mlp(own.gate_up, own.down, dense)
            scores = gpu.linear(routed, block.router.proj.weight)
            way = routing.route(scores, block.router.top_k, block.router.per_expert_scale)
            parts, weights = self._experts(block.experts, mixed, way, dtype)
            behind = (
                _scale(block.post_feedforward_layernorm_1),
                _scale(block.post_feedforward_layernorm_2),
                _scale(block.post_feedforward_layernorm),
            )
            self._aside.join()
            if self._ranks is not None:
                beside, parts = self._ranks.total(torch.stack([beside, parts.squeeze(1)])).unflatten(1, (-1, 1))
            x, normed = layer.leave(
                h, beside, parts, weights, behind, (self._scalars[index], layout.encoded), norms[index + 1],
                self.eps, firsts[index + 1],
            )  # fmt: skip
        return normed.values

    def _attend(
        self, index: int, own: Layer, normed: Ready, layout: Layout, turn: Rotation, dtype: torch.dtype
    ) -> Tensor:
        """[T, H] -> [T, H]."""
        block = self._blocks[index].self_attn
        shape, pool = block.shape, (self.store.keys[index], self.store.values[index])
        turned = layer.heads(
            gpu.product(normed, own.projections, dtype), shape.heads, _scale(block.q_norm), _scale(block.k_norm),
            turn, self.eps, slots=layout.slots[shape.sliding], pool=pool,
        )  # fmt: skip
        seen = attention.attend(*turned, *pool, layout.plans[shape.sliding], own.output)
        return self._added(gpu.product(seen, own.output, dtype))

    def _experts(self, experts: Experts, x: Ready, way: routing.Routing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What experts give, and its weights: [T, k, H] and [T, k]. Of a network in parts this rank's experts',
        already weighted, [T, 1, H], and ones.
        """
        if self._ranks is None:
            return expert_outputs(x, way.order, way.offsets, *experts.held(), dtype=dtype), way.weights
        first, end = self._ranks.experts
        own = expert_outputs(
            x, way.order, way.offsets[first : end + 1], *experts.held(), dtype=dtype, of=len(way.offsets) - 1
        )
        weights = torch.where((way.experts >= first) & (way.experts < end), way.weights, 0.0)
        return weighted_sum(own, weights)[:, None], torch.ones_like(weights[:, :1])

    def _added(self, x: Tensor) -> Tensor:
        """Over the ranks of a network in parts."""
        return x if self._ranks is None else self._ranks.total(x)

    def _mlp(self, gate_up: Operand, down: Operand, x: Ready) -> Tensor:
        both = gpu.product(x, gate_up, self.network.dtype)
        return gpu.product(layer.gate(both, down), down, self.network.dtype)

    def _layer(self, block: Block) -> Layer:
        own, mlp = block.self_attn, block.mlp
        names = (own.q_proj, own.k_proj) if own.v_proj is None else (own.q_proj, own.k_proj, own.v_proj)
        return Layer(
            operand(merged(*names)),
            operand(own.o_proj.weight),
            operand(merged(mlp.gate_proj, mlp.up_proj)),
            operand(mlp.down_proj.weight),
            operand(block.experts.gate_up_proj),
        )


def merged(*modules: Linear) -> Tensor | Quantized:
    """One matrix of several with the same inputs, whose weights become views of it; they must be of one form."""
    weights, first = [module.weight for module in modules], 0
    if isinstance(weights[0], Quantized):
        joined = {name: torch.cat([getattr(own, name) for own in weights]) for name in weights[0].tensors}
        whole: Tensor | Quantized = replace(weights[0], **joined)
    else:
        whole = torch.cat([own.data for own in weights])
    for module, own in zip(modules, weights, strict=True):
        part = whole[first : first + own.shape[0]]
        module.weight = nn.Parameter(part, requires_grad=False) if isinstance(part, Tensor) else part
        first += own.shape[0]
    return whole


def _scale(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight
