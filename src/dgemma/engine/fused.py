"""The network's layers on a GPU: a forward of many requests in about sixteen launches a layer, laid out once for all.

The arithmetic is that of `model/`; what differs is where it is rounded (`kernels/triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..kernels import gpu
from ..kernels.triton import attention, layer, routing
from ..kernels.triton.experts import expert_outputs
from ..model import Mode, Network
from ..model.attention import Attention
from ..model.block import Block
from ..model.mlp import MLP
from ..model.norm import RMSNorm
from ..model.rope import Rotation, rotation
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

    def to(self, device: torch.device) -> Layout:
        """The same on a device."""
        return Layout(
            encoded=self.encoded,
            positions=self.positions.to(device, non_blocking=True),
            slots={kind: slots.to(device, non_blocking=True) for kind, slots in self.slots.items()},
            plans={kind: plan.to(device) for kind, plan in self.plans.items()},
        )


def lay_out(
    segments: Sequence[Segment],
    config: ModelConfig,
    page: int,
    *,
    pitch: int | None = None,
    columns: int = 1,
) -> Layout:
    """A forward over segments, those that are encoded first; on the host.

    Args:
        page: tokens of a page.
        pitch: rows that each segment has; None: as many as tokens.
        columns: pages that there is room for at least in each request's line.
    """
    spans = [torch.arange(s.start, s.start + (pitch or s.length)) for s in segments]
    encoding = [s.mode is Mode.ENCODE for s in segments]
    slots, plans = {}, {}
    for sliding in (False, True):
        pages = [s.table.sliding if sliding else s.table.full for s in segments]
        places = []
        for segment, span, own, encoded in zip(segments, spans, pages, encoding, strict=True):
            place = torch.full_like(span, -1)
            if encoded:
                real = span[: segment.length]
                table = torch.tensor([-1 if page is None else page for page in own])
                place[: segment.length] = table[real // page] * page + real % page
            places.append(place)
        slots[sliding] = torch.cat(places)
        shape = next((s for s in config.layers if s.sliding is sliding), config.layers[0])
        plans[sliding] = attention.plan(
            [(s.start, s.length, encoded) for s, encoded in zip(segments, encoding, strict=True)],
            pages,
            group=shape.heads // shape.kv_heads,
            head_dim=shape.head_dim,
            kv_heads=shape.kv_heads,
            window=config.sliding_window if sliding else None,
            device="cpu",
            pitch=pitch,
            columns=columns,
        )
    return Layout(
        encoded=sum(len(span) for span, encoded in zip(spans, encoding, strict=True) if encoded),
        positions=torch.cat(spans),
        slots=slots,
        plans=plans,
    )


class Fused:
    """The network's forward through the kernels; `gpu.missing` says whether they take all of its weights."""

    def __init__(self, network: Network, store: Store):
        self.network, self.store = network, store
        self.eps = network.config.rms_norm_eps
        self._blocks = [block for block in network.layers if isinstance(block, Block)]
        scalars = [(block.encode_scalar.data, block.denoise_scalar.data) for block in self._blocks]
        self._scalars = torch.stack([torch.cat(pair) for pair in scalars])

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return self.network.embed(tokens)

    def condition(self, embeddings: Tensor, soft: Tensor) -> Tensor:
        """A canvas's embeddings and soft embeddings [T, H] -> input of the first layer (`SelfConditioning`)."""
        own = self.network.self_conditioning
        normed = layer.norm(soft, _scale(own.pre_norm), self.eps)
        return layer.norm(embeddings + _mlp(own, normed), None, self.eps)

    def run(self, x: Tensor, layout: Layout) -> Tensor:
        """All layers and the final norm: [T, H] -> [T, H]."""
        blocks = self._blocks
        if self.network.expert_stream is not None:
            self.network.expert_stream.begin()
        shapes = dict.fromkeys(self.network.config.layers)
        turns = {shape: rotation(layout.positions, shape, x.dtype) for shape in shapes}
        rows = torch.arange(len(x), device=x.device) >= layout.encoded
        scalars = self._scalars[:, rows.long()]
        norms = [_scale(block.input_layernorm) for block in blocks] + [_scale(self.network.norm)]
        normed = layer.norm(x, norms[0], self.eps)
        for index, block in enumerate(blocks):
            shape = block.self_attn.shape
            seen = self._attend(index, block.self_attn, normed, layout, turns[shape])
            before = _scale(block.pre_feedforward_layernorm), _scale(block.pre_feedforward_layernorm_2)
            norm = _scale(block.post_attention_layernorm)
            h, dense, mixed, routed = layer.enter(seen, x, norm, (*before, block.router.scale), self.eps)
            scores = gpu.linear(routed, block.router.proj.weight)
            way = routing.route(scores, block.router.top_k, block.router.per_expert_scale)
            room = expert_outputs(mixed, way.order, way.offsets, *block.experts.held())
            behind = (
                _scale(block.post_feedforward_layernorm_1),
                _scale(block.post_feedforward_layernorm_2),
                _scale(block.post_feedforward_layernorm),
            )
            x, following = layer.leave(
                h, _mlp(block.mlp, dense), room, way.weights, behind, scalars[index], norms[index + 1], self.eps
            )
            assert following is not None
            normed = following
        return normed

    def _attend(self, index: int, own: Attention, normed: Tensor, layout: Layout, turn: Rotation) -> Tensor:
        """[T, H] -> [T, H]."""
        shape = own.shape
        names = (own.q_proj, own.k_proj) if own.v_proj is None else (own.q_proj, own.k_proj, own.v_proj)
        queries, keys, *rest = (
            out.view(len(normed), -1, shape.head_dim) for out in gpu.linears(normed, *(part.weight for part in names))
        )
        pool = self.store.keys[index], self.store.values[index]
        cos, sin = (part.squeeze(1) for part in turn)
        turned = layer.heads(
            queries, keys, rest[0] if rest else keys, _scale(own.q_norm), _scale(own.k_norm), (cos, sin), self.eps,
            slots=layout.slots[shape.sliding], pool=pool,
        )  # fmt: skip
        seen = attention.attend(*turned, *pool, layout.plans[shape.sliding])
        return gpu.linear(seen.flatten(1), own.o_proj.weight)


def _scale(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight


def _mlp(own: MLP, x: Tensor) -> Tensor:
    gates, up = gpu.linears(x, own.gate_proj.weight, own.up_proj.weight)
    return gpu.linear(layer.gate(gates, up), own.down_proj.weight)
