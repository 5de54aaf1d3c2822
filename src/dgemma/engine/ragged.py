"""One forward over many requests: segments of any length, some encoding, some denoising, no padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import AttentionShape, ModelConfig
from ..model import Mode, View
from ..model.linear import least_rows
from .pages import Table


class Store:
    """Keys and values by page: for each layer two tensors [pages, kv_heads, P, D] of its kind's pool."""

    def __init__(
        self, config: ModelConfig, *, size: int, full: int, sliding: int, device: torch.device, dtype: torch.dtype
    ):
        self.size = size
        counts = [sliding if shape.sliding else full for shape in config.layers]
        shapes = [(n, s.kv_heads, size, s.head_dim) for n, s in zip(counts, config.layers, strict=True)]
        self._sliding = [shape.sliding for shape in config.layers]
        # Not filled: on a CPU a page that nobody has used takes no memory. `clear` comes before any use.
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]

    def clear(self, full: list[int], sliding: list[int]) -> None:
        """Fills pages with zeros: what a page holds beyond its tokens is multiplied by zero, and must be a number."""
        for layer, is_sliding in enumerate(self._sliding):
            pages = sliding if is_sliding else full
            if pages:
                self.values[layer][pages] = 0.0


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one request in a forward.

    Fields:
        table: the request's pages, with room for the tokens if they are encoded.
        start: position of the first.
        length: how many.
        mode: whether they are encoded into the pages or denoised after them.
    """

    table: Table
    start: int
    length: int
    mode: Mode


class RaggedView(View):
    """The tokens of all segments in one row [1, T], each seeing its own request alone.

    In each layer the segments that encode write their keys and values first. So the canvas that follows a prompt's last
    chunk, or a committed canvas, can be in the same forward.
    """

    def __init__(self, store: Store, segments: Sequence[Segment], window: int, device: torch.device):
        spans = [torch.arange(s.start, s.start + s.length) for s in segments]
        super().__init__(torch.cat(spans).to(device))
        self.store, self.segments, self.window = store, segments, window
        self.encodes = torch.cat([torch.full((s.length,), s.mode is Mode.ENCODE) for s in segments]).to(device)
        self._targets: dict[bool, tuple[Tensor, Tensor]] = {}
        for sliding in (False, True):
            pages = [self._page_of(s, span, sliding) for s, span in zip(segments, spans, strict=True)]
            chosen = torch.cat(pages).to(device)[self.encodes]
            self._targets[sliding] = chosen, self.positions[self.encodes] % store.size
        self._masks: dict[tuple[Segment, int, bool], Tensor] = {}

    def choose(self, encode: Tensor, denoise: Tensor) -> Tensor:
        """Each token's scalar [1, T, 1]."""
        return torch.where(self.encodes, encode, denoise)[None, :, None]

    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        raise AssertionError("segments see different things")

    def attend(self, layer: int, shape: AttentionShape, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Writes what is encoded, then lets each segment look: [1, heads, T, D] -> [1, heads, T, D]."""
        pages, places = self._targets[shape.sliding]
        if len(pages):
            self.store.keys[layer][pages, :, places] = keys[0, :, self.encodes].transpose(0, 1)
            self.store.values[layer][pages, :, places] = values[0, :, self.encodes].transpose(0, 1)
        seen, first = [], 0
        for segment in self.segments:
            part = slice(first, first + segment.length)
            if segment.mode is Mode.ENCODE:
                seen.append(self._causal(layer, shape, segment, queries[0, :, part]))
            else:
                seen.append(self._canvas(layer, shape, segment, *(x[:, :, part] for x in (queries, keys, values)))[0])
            first += segment.length
        return torch.cat(seen, dim=1)[None]

    def _canvas(
        self, layer: int, shape: AttentionShape, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """A canvas sees its prefix (the last `window - 1` tokens of it in sliding layers) and all of itself."""
        first = max(0, segment.start - self.window + 1) if shape.sliding else 0
        if first < segment.start:
            keys = torch.cat([self._gather(self.store.keys[layer], segment, first, shape.sliding), keys], dim=2)
            values = torch.cat([self._gather(self.store.values[layer], segment, first, shape.sliding), values], dim=2)
        return F.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, enable_gqa=shape.heads != shape.kv_heads
        )

    def _gather(self, pool: Tensor, segment: Segment, first: int, sliding: bool) -> Tensor:
        """The request's entries from `first` to the segment's start: [1, kv_heads, entries, D]."""
        size = self.store.size
        begin, end = first // size, -(-segment.start // size)
        pages = (segment.table.sliding if sliding else segment.table.full)[begin:end]
        entries = pool[pages].transpose(0, 1).flatten(1, 2)
        return entries[None, :, first - begin * size : segment.start - begin * size]

    def _causal(self, layer: int, shape: AttentionShape, segment: Segment, queries: Tensor) -> Tensor:
        """Causal attention over pages, [heads, S, D] -> [heads, S, D].

        Page after page, in products of one shape, so that a token's result depends on what is before it and not on
        how its sequence was cut into segments.
        """
        heads, length, width = queries.shape
        group = heads // shape.kv_heads
        rows = length if queries.dtype != torch.float32 else max(length, least_rows())
        if rows > length:
            queries = F.pad(queries, (0, 0, 0, rows - length))
        flat = queries.reshape(shape.kv_heads, group * rows, width)
        end = segment.start + segment.length
        first = self.pages_first(segment.start) if shape.sliding else 0
        pages = (segment.table.sliding if shape.sliding else segment.table.full)[first : -(-end // self.store.size)]

        scores, highest = [], None
        for number, page in enumerate(pages, start=first):
            mask = self._mask(segment, number, shape.sliding, rows)
            score = torch.bmm(flat, self.store.keys[layer][page].mT).float().view(shape.kv_heads, group, rows, -1)
            score = score.masked_fill(mask, float("-inf"))
            peak = score.amax(dim=-1, keepdim=True)
            highest = peak if highest is None else torch.maximum(highest, peak)
            scores.append(score)
        assert highest is not None
        total = torch.zeros_like(highest)
        mixed = torch.zeros(shape.kv_heads, group * rows, width, device=queries.device)
        for page, score in zip(pages, scores, strict=True):
            weight = torch.exp(score - highest)
            total += weight.sum(dim=-1, keepdim=True)
            values = self.store.values[layer][page]
            mixed += torch.bmm(weight.to(values.dtype).flatten(1, 2), values).float()
        mixed = mixed.view(shape.kv_heads, group, rows, width) / total
        return mixed.view(heads, rows, width)[:, :length].to(queries.dtype)

    def pages_first(self, position: int) -> int:
        """The first page that the sliding layers of a token at `position` look at."""
        return max(0, position - self.window + 1) // self.store.size

    def _mask(self, segment: Segment, page: int, sliding: bool, rows: int) -> Tensor:
        """[rows, P] bool, True where a query does not see a key. Rows of fill see the first key of each page."""
        key = (segment, page, sliding)
        if key not in self._masks:
            device = self.positions.device
            queries = torch.arange(segment.start, segment.start + rows, device=device)[:, None]
            keys = torch.arange(page * self.store.size, (page + 1) * self.store.size, device=device)[None, :]
            hidden = keys > queries
            if sliding:
                hidden |= keys <= queries - self.window
            hidden[segment.length :] = False
            self._masks[key] = hidden
        return self._masks[key]

    def _page_of(self, segment: Segment, span: Tensor, sliding: bool) -> Tensor:
        """The page that each token of an encoding segment goes to; zeros for one that denoises."""
        if segment.mode is Mode.DENOISE:
            return torch.zeros_like(span)
        pages = segment.table.sliding if sliding else segment.table.full
        return torch.tensor([-1 if page is None else page for page in pages])[span // self.store.size]
