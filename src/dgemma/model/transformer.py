"""The network: one set of weights, run as encoder (causal, writes the cache) or denoiser (bidirectional, reads it)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import CapacityError
from ..kernels import cpu
from ..params import GenerationConfig
from .attention import Attention
from .block import Block
from .linear import combine, linear, lookup
from .mlp import MLP
from .norm import RMSNorm
from .offload import ExpertStream
from .ranks import Ranks
from .self_conditioning import SelfConditioning
from .view import Cache, DenoiseView, EncodeView, View


class Network(nn.Module):
    """DiffusionGemma's text network. Shape letters: B batch, S sequence, L canvas, H hidden, V vocabulary.

    Can be built on the meta device: nothing but the parameters needs filling in afterwards.

    Args:
        ranks: this process's place among those that hold the network together; all of them make the same calls, and
            get the same results. `config` is then that of this part: fewer heads and inner columns.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks | None = None):
        super().__init__()
        self.ranks = ranks
        self.expert_stream: ExpertStream | None = None  # where the experts stay in host memory
        self.config = config = config if ranks is None else ranks.own
        self.generation = GenerationConfig()  # the checkpoint's defaults, set by whoever loads one
        first, end = (0, config.vocab_size) if ranks is None else ranks.words
        self.embed_tokens = nn.Embedding(end - first, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, ranks) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                module.ranks = ranks

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations have."""
        return next(self.parameters()).dtype

    def quantized(self) -> dict[str, cpu.Weight]:
        """The weights that are held in few bits, by name; they are not in `state_dict`."""
        return {
            f"{path}.{name}": weight
            for path, module in self.named_modules()
            for name, weight in vars(module).items()
            if isinstance(weight, cpu.Weight)
        }

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for `batch` sequences; it grows as it is written."""
        return Cache(self.config, batch, self.device, self.dtype)

    def encode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Encodes tokens [B, S] int64 after what `cache` holds and appends them to it -> hidden states [B, S, H].

        Any split of a sequence into calls gives the same cache.

        Raises:
            CapacityError: the sequence would be longer than `max_position_embeddings`.
        """
        view = EncodeView(cache, self._checked(tokens, cache), tokens.device)
        hidden = self.run(self.embed(tokens), view)
        view.commit()
        return hidden

    def denoise(self, canvas: Tensor, cache: Cache, soft: Tensor | None = None) -> Tensor:
        """One look at a canvas [B, L] int64 that follows what `cache` holds -> logits [B, L, V] float32, soft-capped.

        Args:
            soft: `soft_embeddings` of the previous step [B, L, H]; None on a canvas's first step.
        """
        view = DenoiseView(cache, self._checked(canvas, cache), canvas.device)
        return self.logits(self.run(self.self_conditioning.condition(self.embed(canvas), soft), view))

    def run(self, x: Tensor, view: View) -> Tensor:
        """All layers and the final norm: [B, S, H] -> [B, S, H]."""
        if self.expert_stream is not None:
            self.expert_stream.begin()
        for layer in self.layers:
            x = layer(x, view)
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the table times sqrt(H): [B, S] -> [B, S, H]."""
        if self.ranks is None:
            return lookup(tokens, self.embed_tokens.weight, self.dtype) * self.embedding_scale()
        first, end = self.ranks.words
        ours = (tokens >= first) & (tokens < end)
        rows = lookup(torch.where(ours, tokens - first, 0), self.embed_tokens.weight, self.dtype)
        return self.ranks.total(torch.where(ours[..., None], rows, 0.0)) * self.embedding_scale()

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied head, soft-capped: [..., H] -> [..., V] float32."""
        scores = linear(hidden, self.embed_tokens.weight).float()
        scores = scores if self.ranks is None else self.ranks.joined(scores)
        cap = self.config.final_logit_softcapping
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def look(self, hidden: Tensor, wish: cpu.Wish, uniform: Tensor | None, hint: Tensor | None) -> cpu.Look:
        """`logits`, what follows from them, and `blend`, in one operation on a CPU: hidden [n, H] -> `Look` of n
        positions, its soft embeddings [n, H] in the network's dtype. See `kernels.cpu.vocabulary`. Not in parts.
        """
        assert self.ranks is None
        wish = replace(wish, cap=self.config.final_logit_softcapping)
        look = cpu.vocabulary(hidden, self.embed_tokens.weight, wish, uniform=uniform, hint=hint, product=linear)
        assert look.soft is not None
        return look._replace(soft=look.soft.to(self.dtype) * self.embedding_scale())

    def soft_embeddings(self, processed_logits: Tensor) -> Tensor:
        """`softmax(processed) @ table * sqrt(H)`: [B, L, V] -> [B, L, H], the next step's self-conditioning.

        The logits are rounded to the network's dtype before the softmax, as the reference carries them.
        """
        return self.blend(torch.softmax(processed_logits.to(self.dtype), dim=-1, dtype=torch.float32))

    def blend(self, weights: Tensor) -> Tensor:
        """`weights @ table * sqrt(H)`: [..., V] -> [..., H]."""
        if self.ranks is None:
            return combine(weights.to(self.dtype), self.embed_tokens.weight) * self.embedding_scale()
        first, end = self.ranks.words
        own = combine(weights[..., first:end].to(self.dtype).contiguous(), self.embed_tokens.weight)
        return self.ranks.total(own) * self.embedding_scale()

    def embedding_scale(self) -> Tensor:
        """sqrt(H), rounded to the table's dtype first; made where the weights are, so that a graph can hold it."""
        return torch.full((), self.config.hidden_size**0.5, dtype=self.dtype, device=self.device)

    def _checked(self, tokens: Tensor, cache: Cache) -> int:
        assert tokens.ndim == 2 and tokens.shape[0] == cache.batch, f"tokens {tuple(tokens.shape)}, batch {cache.batch}"
        length, limit = tokens.shape[1], self.config.max_position_embeddings
        if cache.length + length > limit:
            raise CapacityError(f"{cache.length} tokens and {length} more exceed the model's context of {limit}")
        return length
