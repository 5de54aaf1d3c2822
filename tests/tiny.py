"""Small random checkpoints, written by transformers: what the parity tests compare both implementations on.

Every norm, scalar and router scale is random (at their defaults of 1 a wrong formula can pass), the encoder's and the
decoder's `layer_scalar` differ, and the weights are large enough that logits are peaked in some places and flat in
others, so that canvases settle neither at once nor never.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

S, F = "sliding_attention", "full_attention"
PAD, EOS, BOS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Sizes of one small checkpoint; `layers` has one letter a layer: s(liding) or f(ull).

    Fields:
        release_spelling: config.json names `global_head_dim` and `num_global_key_value_heads`, as the release does.
        softcap: None leaves the key out of config.json.
        sharp: standard deviation of the logits of a hidden state without relation to the embeddings.
        mix: how much a layer adds to its input; low values make the network copy its canvas.
        shard: size at which transformers starts a new file.
    """

    name: str
    hidden: int = 32
    intermediate: int = 48
    layers: str = "ssf"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    global_head_dim: int = 16
    global_kv_heads: int | None = 1
    window: int = 12
    vocab: int = 60
    experts: int = 4
    top_k: int = 2
    moe_intermediate: int = 16
    canvas: int = 16
    softcap: float | None = 30.0
    eps: float = 1e-6
    theta_sliding: float = 10_000.0
    theta_full: float = 1_000_000.0
    rotary_fraction: float = 0.25
    bidirectional: str | None = "vision"
    release_spelling: bool = False
    shard: str = "5GB"
    sharp: float = 4.0
    mix: float = 0.45
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name="base"),
        Spec(name="one_layer", layers="f", hidden=24, canvas=8, vocab=40, mix=0.8, seed=1),
        Spec(name="all_full", layers="fff", hidden=40, heads=5, kv_heads=5, global_kv_heads=5, mix=0.55, seed=2),
        Spec(
            name="deep",
            layers="sssssf" * 2, hidden=48, heads=6, kv_heads=3, global_kv_heads=2, mix=0.18, seed=3,
        ),
        Spec(name="tiny_window", window=2, layers="sfsf", canvas=12, seed=4),
        Spec(name="short_window", window=3, layers="ssf", canvas=10, mix=0.6, seed=5),
        Spec(name="wide_window", window=512, layers="ssf", canvas=24, mix=0.6, seed=6),
        Spec(name="multi_query", heads=8, kv_heads=1, head_dim=4, global_kv_heads=1, global_head_dim=8, seed=7),
        Spec(name="no_grouping", heads=4, kv_heads=4, global_kv_heads=None, head_dim=16, global_head_dim=8, seed=8),
        Spec(name="top_one", experts=6, top_k=1, canvas=20, vocab=90, seed=9),
        Spec(name="top_all", experts=5, top_k=5, canvas=9, window=5, mix=0.35, seed=10),
        Spec(name="one_expert", experts=1, top_k=1, moe_intermediate=24, mix=0.35, seed=11),
        Spec(name="many_experts", experts=32, top_k=8, moe_intermediate=4, vocab=128, canvas=32, mix=0.38, seed=12),
        Spec(name="low_cap", softcap=15.0, sharp=3.0, mix=0.2, seed=13),
        Spec(name="cap_left_out", softcap=None, sharp=7.0, mix=0.65, seed=14),
        Spec(
            name="odd",
            hidden=37, intermediate=53, heads=3, kv_heads=3, head_dim=6, global_head_dim=14, global_kv_heads=3,
            vocab=71, experts=7, top_k=3, moe_intermediate=11, window=7, canvas=13, eps=1e-5, seed=15,
        ),
        Spec(
            name="release_spelling", release_spelling=True,
            hidden=64, heads=8, kv_heads=4, global_kv_heads=2, mix=0.6, seed=16,
        ),
        Spec(name="sharded", shard="20KB", hidden=48, layers="sfsf", canvas=8, mix=0.6, seed=17),
        Spec(name="thetas", theta_sliding=100.0, theta_full=5_000.0, rotary_fraction=0.5, global_head_dim=24, seed=18),
        Spec(name="all_rotate", rotary_fraction=1.0, theta_full=300.0, bidirectional=None, canvas=48, mix=0.5, seed=19),
        Spec(name="large_vocab", vocab=1000, hidden=64, intermediate=32, canvas=16, window=20, mix=0.6, seed=20),
    )
}  # fmt: skip


def config(spec: Spec) -> Any:
    """The transformers configuration of a spec."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, Gemma4VisionConfig

    text: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": len(spec.layers),
        "layer_types": [S if letter == "s" else F for letter in spec.layers],
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "global_head_dim": spec.global_head_dim,
        "sliding_window": spec.window,
        "num_experts": spec.experts,
        "top_k_experts": spec.top_k,
        "moe_intermediate_size": spec.moe_intermediate,
        "max_position_embeddings": 4096,
        "rms_norm_eps": spec.eps,
        "use_bidirectional_attention": spec.bidirectional,
        "rope_parameters": {
            S: {"rope_type": "default", "rope_theta": spec.theta_sliding},
            F: {
                "rope_type": "proportional",
                "partial_rotary_factor": spec.rotary_fraction,
                "rope_theta": spec.theta_full,
            },
        },
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        **spec.extra,
    }
    if spec.global_kv_heads is not None:
        text["num_global_key_value_heads"] = spec.global_kv_heads
    if spec.softcap is not None:
        text["final_logit_softcapping"] = spec.softcap
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        position_embedding_size=16,
        patch_size=4,
    )
    return DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text),
        vision_config=vision,
        canvas_length=spec.canvas,
        image_token_id=spec.vocab - 1,
        boi_token_id=spec.vocab - 2,
        eoi_token_id=spec.vocab - 3,
    )


def _fill(name: str, tensor: torch.Tensor, spec: Spec, generator: torch.Generator) -> None:
    """Random values for one tensor; the rules keep a random network between flat and copying."""

    def uniform(low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    def normal(std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    if name.endswith("layer_scalar"):
        uniform(0.6, 1.5)
    elif name.endswith("per_expert_scale"):
        uniform(0.4, 1.8)
    elif name.endswith("router.scale"):
        uniform(0.5, 2.0)
    elif "post_attention_layernorm" in name or name.endswith("post_feedforward_layernorm.weight"):
        uniform(0.3 * spec.mix, 1.7 * spec.mix)
    elif "q_norm" in name or "k_norm" in name:
        uniform(0.3, 1.3)
    elif tensor.ndim == 1:
        uniform(0.4, 1.7)
    elif "embed_tokens" in name:
        normal(spec.sharp * spec.hidden**-0.5)
    elif "router.proj" in name:
        normal(1.5)
    else:
        normal(1.3 * tensor.shape[-1] ** -0.5)


def build(spec: Spec, directory: Path) -> Path:
    """Writes the checkpoint of a spec; the same spec always gives the same weights."""
    from transformers import DiffusionGemmaForBlockDiffusion

    generator = torch.Generator().manual_seed(1000 + spec.seed)
    model = DiffusionGemmaForBlockDiffusion(config(spec))
    with torch.no_grad():
        for name, tensor in _tensors(model):
            _fill(name, tensor, spec, generator)
    model.save_pretrained(directory, max_shard_size=spec.shard)
    if spec.release_spelling:
        respell(directory / "config.json", spec)
    return directory


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar"))


def respell(path: Path, spec: Spec) -> None:
    """Rewrites a config.json in the release's spelling of the full layers' sizes."""
    data = json.loads(path.read_text())
    text = data["text_config"]
    text.pop("per_layer_config")
    text["global_head_dim"] = spec.global_head_dim
    text["num_global_key_value_heads"] = spec.global_kv_heads
    path.write_text(json.dumps(data, indent=2))


def prompt(spec: Spec, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, spec.vocab - 3, (batch, length), generator=generator)


class Reference:
    """transformers' model of one checkpoint, behind the names that dgemma's network has."""

    def __init__(self, path: Path, *, dtype: str = "float32", attention: str = "sdpa"):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # The grouped expert kernel wants sizes in multiples of 16 bytes and sums in another order; the plain loop
        # takes any size.
        self.model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation="eager"
        ).eval()

    def new_cache(self) -> Any:
        """An empty cache; sliding layers drop what no later token sees."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    @torch.no_grad()
    def encode(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """[B, S] -> final-normed hidden states [B, S, H], appended to the cache."""
        return self.model.model.encoder(input_ids=tokens, past_key_values=cache).last_hidden_state

    @torch.no_grad()
    def denoise(self, canvas: torch.Tensor, cache: Any, processed: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] and the previous step's processed logits [B, L, V] or None -> logits [B, L, V]."""
        carried = None if processed is None else processed.to(self.model.dtype)
        return self.model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=carried).logits

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The tied head as the model's forward applies it."""
        cap = self.model.final_logit_softcapping
        return torch.tanh(self.model.lm_head(hidden).float() / cap) * cap

    def generate(self, tokens: torch.Tensor, params: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own `generate` with a `dgemma.params.GenerationConfig`: sequences [B, S + C*L], steps of each row [B]."""
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )

        # The counter of forwards that each row was active for is local to `generate`; this is where it comes out.
        counted: list[torch.Tensor] = []
        self.model._compute_tokens_per_forward = lambda ids, passes, *rest: counted.append(passes.clone())
        # `generate` fills what a config leaves at None from the model's own; there, None is to mean none.
        self.model.generation_config.pad_token_id = self.model.generation_config.eos_token_id = None
        settings = DiffusionGemmaGenerationConfig(
            max_new_tokens=params.max_new_tokens,
            max_denoising_steps=params.max_denoising_steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=params.entropy_bound),
            t_min=params.t_min,
            t_max=params.t_max,
            confidence_threshold=params.confidence_threshold,
            stability_threshold=params.stability_threshold,
            eos_token_id=list(params.eos_token_ids) or None,
            pad_token_id=params.pad_token_id,
        )
        out = self.model.generate(tokens, generation_config=settings)
        return out.sequences, counted[0]


def load_network(path: Path, dtype: str = "float32") -> Any:
    """dgemma's network of a checkpoint."""
    import dgemma
    from dgemma.checkpoint import VisionIgnored

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VisionIgnored)  # these checkpoints have a vision tower, as the release does
        return dgemma.load(path, device="cpu", dtype=dtype).network


class Lab:
    """Builds and loads every checkpoint once: `path`, `network` (dgemma's) and `reference` (transformers')."""

    def __init__(self, root: Path):
        self.root = root
        self._kept: dict[tuple[str, ...], Any] = {}

    def path(self, name: str) -> Path:
        """Directory of the checkpoint of a named spec."""
        directory = self.root / name
        return directory if directory.exists() else build(SPECS[name], directory)

    def network(self, name: str, dtype: str = "float32") -> Any:
        """dgemma's network."""
        return self._once(("network", name, dtype), lambda: load_network(self.path(name), dtype))

    def reference(self, name: str, dtype: str = "float32", attention: str = "sdpa") -> Reference:
        """transformers' model."""
        return self._once(
            ("reference", name, dtype, attention),
            lambda: Reference(self.path(name), dtype=dtype, attention=attention),
        )

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
