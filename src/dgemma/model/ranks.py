"""A network in parts: several processes, each with a slice of every large matrix, that make the same calls.

| matrix | what a rank has | what is added up or joined |
|---|---|---|
| `q_proj`, `k_proj`, `v_proj` | some heads; a key head that several ranks need is with all of them | |
| `o_proj` | the columns of its heads | its outputs are added |
| dense MLP and self-conditioning | some inner columns, whole groups of `STEP` | what `down_proj` gives is added |
| experts | whole ones, so that no group of a weight in few bits is cut | their weighted sums are added |
| the table | some words | embeddings and blends are added, scores joined |

Router, norms and scalars are with every rank. Sums are the same on all ranks to the bit, so whatever follows from them
is too; they differ from one process's by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..config import AttentionShape, ModelConfig
from ..errors import ConfigError
from ..quant import Quantized

STEP = 64  # inner columns that stay together, the group of weights in 4 bits; fewer where 64 does not divide the width
Part = TypeVar("Part", Tensor, Quantized)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process's place among those that hold a network together.

    Fields:
        rank, size: which one, of how many.

    Raises:
        ConfigError: the network's sizes cannot be divided so; the message names what does not.
    """

    rank: int
    size: int
    config: ModelConfig

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        for shape in config.layers:
            if shape.heads % size:
                raise ConfigError(f"tensor_parallel: {size} does not divide the {shape.heads} heads of {shape.kind}")
            if shape.kv_heads % size and size % shape.kv_heads:
                raise ConfigError(f"tensor_parallel: {size} and {shape.kv_heads} key heads do not divide each other")
        counts = {"experts": config.num_experts, "inner columns": config.intermediate_size // self._step}
        for what, count in {**counts, "words": config.vocab_size}.items():
            if count < size:
                raise ConfigError(f"tensor_parallel: {size} ranks are more than the {count} {what}")

    @property
    def own(self) -> ModelConfig:
        """Sizes of this rank's layers; vocabulary and number of experts stay those of the whole."""
        layers = tuple(replace(shape, heads=shape.heads // self.size, kv_heads=self._kv(shape)[1])
                       for shape in self.config.layers)  # fmt: skip
        first, end = self.inner
        return replace(self.config, layers=layers, intermediate_size=end - first)

    @property
    def words(self) -> tuple[int, int]:
        """First and end of the table's rows."""
        return self._range(self.config.vocab_size)

    @property
    def experts(self) -> tuple[int, int]:
        """First and end of the experts."""
        return self._range(self.config.num_experts)

    @property
    def inner(self) -> tuple[int, int]:
        """First and end of the dense MLP's inner columns."""
        first, end = self._range(self.config.intermediate_size // self._step)
        return first * self._step, end * self._step

    def cut(self, name: str, weight: Part) -> Part:
        """This rank's part of the weight of that name, in memory of its own.

        Raises:
            ConfigError: a group of a weight in few bits would be cut.
        """
        axis, first, end = self._where(name)
        if axis is None:
            return weight
        if isinstance(weight, Tensor):
            return weight.narrow(axis, first, end - first).clone()
        if axis == 1:
            data, scales = weight.data[..., first * weight.bits // 8 : end * weight.bits // 8], weight.scales
            if weight.group is not None:
                if first % weight.group or end % weight.group:
                    raise ConfigError(f"tensor_parallel: {name} has groups of {weight.group}, which would be cut")
                scales = scales[..., first // weight.group : end // weight.group]
            return replace(weight, data=data, scales=scales).each(Tensor.clone)
        return weight[first:end].each(Tensor.clone)

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in its place."""
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """Every rank's x, which all have in one shape: [...] -> [ranks, ...]."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts), x)
        return parts

    def joined(self, x: Tensor) -> Tensor:
        """All ranks' scores side by side: [..., own words] -> [..., words]."""
        sizes = self.word_counts
        parts = self.gathered(torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1])))
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    @property
    def word_counts(self) -> list[int]:
        """How many of the table's rows each rank has."""
        ranges = (replace(self, rank=rank).words for rank in range(self.size))
        return [end - first for first, end in ranges]

    @property
    def _step(self) -> int:
        width = self.config.intermediate_size
        return next((s for s in (STEP, 32, 16, 8) if width % s == 0 and width // s >= self.size), 1)

    def _range(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def _kv(self, shape: AttentionShape) -> tuple[int, int]:
        """The first key head of this rank, and how many it has."""
        each = max(1, shape.kv_heads // self.size)
        return self.rank * shape.kv_heads // self.size, each

    def _where(self, name: str) -> tuple[int | None, int, int]:
        """The axis that a weight is cut along, and the range; None for what every rank has."""
        *path, owner, last = name.split(".")
        if owner == "embed_tokens":
            return 0, *self.words
        if owner == "experts":
            return 0, *self.experts
        if last != "weight":
            return None, 0, 0
        if owner in ("gate_proj", "up_proj", "down_proj"):
            return (1 if owner == "down_proj" else 0), *self.inner
        if owner in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shape = self.config.layers[int(path[1])]
            first, count = self._kv(shape) if owner in ("k_proj", "v_proj") else (
                shape.heads // self.size * self.rank, shape.heads // self.size
            )  # fmt: skip
            return int(owner == "o_proj"), first * shape.head_dim, (first + count) * shape.head_dim
        return None, 0, 0
