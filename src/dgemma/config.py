"""The network's sizes, read from `config.json` in both spellings that are in use, and counted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}

# Keys of `text_config` that change nothing here: bookkeeping that transformers writes, and training-time settings.
_INERT_TEXT_KEYS = {
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward",
    "dtype", "eos_token_id", "hidden_size_per_layer_input", "id2label", "initializer_range", "is_encoder_decoder",
    "label2id", "model_type", "num_kv_shared_layers", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache", "vocab_size_per_layer_input",
    "attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp", "expert_intermediate_size",
}  # fmt: skip
_TOP_KEYS = {
    "architectures", "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "bos_token_id", "canvas_length",
    "dtype", "eoa_token_id", "eoa_token_index", "eoi_token_id", "eos_token_id", "id2label", "image_token_id",
    "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "text_config", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "video_token_id", "vision_config", "vision_soft_tokens_per_image", "quantization_config",
    "chunk_size_feed_forward", "_name_or_path", "use_cache",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One layer's attention: its kind, heads and head width, and its rotary frequencies' parameters."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    rotary_fraction: float

    @property
    def sliding(self) -> bool:
        """Whether the layer sees a window only; a full layer has no `v_proj`: its values are its raw keys."""
        return self.kind == SLIDING

    def parameters(self, hidden: int) -> int:
        """Number of weights of this layer's projections and head norms."""
        projections = 2 * self.heads + self.kv_heads * (2 if self.sliding else 1)
        return projections * self.head_dim * hidden + 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a DiffusionGemma network (text part); `raw` keeps the file's content for saving.

    Names are those of `config.json`; `layers` has one `AttentionShape` a layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    sliding_window: int
    canvas_length: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    layers: tuple[AttentionShape, ...]
    dtype: str
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Reads a `config.json`.

        Raises:
            ConfigError: the file is missing, no JSON, or has an unknown key or an impossible value.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a model directory needs a config.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from None
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: object) -> ModelConfig:
        """Builds the configuration from the content of a `config.json`, either spelling."""
        if not isinstance(data, dict):
            raise ConfigError("holds no JSON object")
        kind = data.get("model_type")
        if kind != "diffusion_gemma":
            raise ConfigError(
                f"model_type: {kind!r} is not diffusion_gemma; dgemma runs DiffusionGemma checkpoints only"
            )
        for key in data:
            if key not in _TOP_KEYS:
                raise ConfigError(f"{key}: unknown key")
        text = data.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError("text_config: missing; it holds the network's sizes")
        reader, top = _Reader(text), _Reader(data, "")
        sizes = {
            name: reader.whole(name)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts")
        }
        top_k = reader.whole("top_k_experts", high=sizes["num_experts"])
        config = cls(
            **sizes,
            top_k_experts=top_k,
            sliding_window=reader.whole("sliding_window", 512),
            max_position_embeddings=reader.whole("max_position_embeddings", 131_072),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            # Absent means the class's default of 30, null means no cap: transformers leaves defaults out.
            final_logit_softcapping=reader.number("final_logit_softcapping", 30.0, nullable=True),
            canvas_length=top.whole("canvas_length", 256),
            layers=_layers(reader),
            dtype=str(data.get("dtype") or data.get("torch_dtype") or text.get("dtype") or "bfloat16"),
            raw=data,
        )
        for part in (reader, top):
            part.only("tie_word_embeddings", (None, True), True)
        reader.finish(_INERT_TEXT_KEYS)
        return config

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def parameters(self) -> dict[str, int]:
        """Weights by part; "experts_active" of "experts" are used for one token. Vision is not counted."""
        h, i, m, e = self.hidden_size, self.intermediate_size, self.moe_intermediate_size, self.num_experts
        n = self.num_layers
        return {
            "embedding": self.vocab_size * h,
            "attention": sum(layer.parameters(h) for layer in self.layers),
            "dense MLP": n * 3 * h * i,
            "experts": n * e * 3 * h * m,
            "router": n * (e * h + h + e),
            "self-conditioning": 3 * h * i + h,
            "norms and scalars": n * (7 * h + 2) + h,
        }

    def total_parameters(self) -> int:
        """All weights of the text network."""
        return sum(self.parameters().values())

    def active_parameters(self) -> int:
        """Weights that one token's forward uses: all but the experts it is not routed to.

        The embedding counts once, as it is read as the output head.
        """
        experts = self.parameters()["experts"]
        return self.total_parameters() - experts + experts * self.top_k_experts // self.num_experts

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> tuple[int, int]:
        """Bytes of keys and values a token: (in full layers, which grow; in sliding layers, up to the window)."""
        full = sum(2 * a.kv_heads * a.head_dim for a in self.layers if not a.sliding)
        sliding = sum(2 * a.kv_heads * a.head_dim for a in self.layers if a.sliding)
        return full * bytes_per_value, sliding * bytes_per_value


def _layers(reader: _Reader) -> tuple[AttentionShape, ...]:
    """One attention shape a layer, from either spelling."""
    count = reader.whole("num_hidden_layers")
    kinds = reader.take("layer_types", None)
    if kinds is None:
        kinds = [FULL if (index + 1) % 6 == 0 else SLIDING for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(f"text_config.layer_types: needs {count} entries, each {SLIDING} or {FULL}")
    kinds = [*kinds[:-1], FULL]  # the reference forces the last layer to be a full one
    heads = reader.whole("num_attention_heads")
    common = {"head_dim": reader.whole("head_dim", 256), "num_key_value_heads": reader.whole("num_key_value_heads")}
    full = {
        "head_dim": reader.whole("global_head_dim", 512),
        "num_key_value_heads": reader.whole("num_global_key_value_heads", common["num_key_value_heads"]),
    }
    reader.only("attention_bias", (False,), False)
    reader.only("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    reader.only("use_bidirectional_attention", (None, "vision"), None)
    own = _overrides(reader, kinds, full)
    rope = reader.section("rope_parameters", {SLIDING, FULL})
    turns = {kind: _rope(kind, rope.get(kind)) for kind in set(kinds)}
    shapes = []
    for index, kind in enumerate(kinds):
        sizes = {**common, **own.get(index, {})}
        if heads % sizes["num_key_value_heads"]:
            raise ConfigError(
                f"text_config.num_key_value_heads: {heads} heads do not divide into "
                f"{sizes['num_key_value_heads']} (layer {index})"
            )
        if sizes["head_dim"] % 2:
            raise ConfigError(f"text_config.head_dim: {sizes['head_dim']} is odd; rotary positions need pairs")
        theta, fraction = turns[kind]
        shapes.append(
            AttentionShape(
                kind=kind,
                heads=heads,
                kv_heads=sizes["num_key_value_heads"],
                head_dim=sizes["head_dim"],
                theta=theta,
                rotary_fraction=fraction,
            )
        )
    return tuple(shapes)


def _overrides(reader: _Reader, kinds: list[str], full: dict[str, int]) -> dict[int, dict[str, int]]:
    """Sizes that differ by layer: what `per_layer_config` says, or those of the full layers."""
    if reader.data.get("per_layer_config") is None:
        reader.take("per_layer_config", None)
        return {index: full for index, kind in enumerate(kinds) if kind == FULL}
    # transformers pads the numbers with zeros to one width: "05" in a network of 30 layers.
    names = {f"{index:0{width}}" for index in range(len(kinds)) for width in range(len(str(len(kinds))) + 1)}
    sections = reader.section("per_layer_config", names)
    own = {}
    for index, values in sections.items():
        where = f"text_config.per_layer_config.{index}"
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: holds no JSON object")
        inner = _Reader(values, where + ".")
        own[int(index)] = {name: inner.whole(name) for name in ("head_dim", "num_key_value_heads") if name in values}
        inner.finish(set())
    return own


def _rope(kind: str, settings: Any) -> tuple[float, float]:
    """Theta and rotating fraction of one kind of layer."""
    where = f"text_config.rope_parameters.{kind}"
    default = ROPE_DEFAULTS[kind]
    if settings is None:
        settings = default
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: holds no JSON object")
    reader = _Reader(settings, where + ".")
    reader.only("rope_type", (default["rope_type"],), default["rope_type"])
    theta = reader.number("rope_theta", default["rope_theta"])
    fraction = reader.number("partial_rotary_factor", 1.0)
    reader.finish(set())
    if fraction > 1 or (kind == SLIDING and fraction != 1):
        raise ConfigError(f"{where}.partial_rotary_factor: {fraction} is not supported (sliding layers: only 1.0)")
    return theta, fraction


class _Reader:
    """Takes checked values out of a JSON object and knows which keys are left; `where` stands before their names."""

    def __init__(self, data: dict[str, Any], where: str = "text_config."):
        self.data = dict(data)
        self.where = where

    def take(self, name: str, default: Any) -> Any:
        """Any value."""
        return self.data.pop(name, default)

    def whole(self, name: str, default: int | None = None, high: int | None = None) -> int:
        """A whole number above 0; a missing or null one is the default, if there is one."""
        value = self.take(name, None)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}{name}: missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (high is not None and value > high):
            limit = "a whole number above 0" + (f" and at most {high}" if high is not None else "")
            raise ConfigError(f"{self.where}{name}: {value!r} is not {limit}")
        return value

    def number(self, name: str, default: float, nullable: bool = False) -> Any:
        """A finite number above 0."""
        if name not in self.data:
            return default
        value = self.take(name, None)
        if value is None and nullable:
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good:
            raise ConfigError(f"{self.where}{name}: {value!r} is not a number above 0")
        return float(value)

    def only(self, name: str, supported: tuple[Any, ...], default: Any) -> None:
        """One of few values, all of which mean the same here."""
        value = self.take(name, default)
        if value not in supported:
            raise ConfigError(f"{self.where}{name}: {value!r} is not supported (only {supported[-1]})")

    def section(self, name: str, keys: set[str]) -> dict[str, Any]:
        """A JSON object with known keys; a missing or null one is empty."""
        value = self.take(name, None)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}{name}: holds no JSON object")
        for key in value:
            if key not in keys:
                raise ConfigError(f"{self.where}{name}.{key}: unknown key")
        return value

    def finish(self, inert: set[str]) -> None:
        """Refuses what was not taken."""
        for key in self.data:
            if key not in inert:
                raise ConfigError(f"{self.where}{key}: unknown key")
