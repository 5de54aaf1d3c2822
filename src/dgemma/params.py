"""What one request may ask for (`SamplingParams`) and what a checkpoint answers by default (`GenerationConfig`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, RequestError

MODES = ("diffusion", "autoregressive")
EARLY_TEXT = ("off", "safe", "eager")
MOST_LOGPROBS = 20
MOST_BIAS = 100.0
PRESETS: dict[str, dict[str, Any]] = {
    # Looser bounds settle more positions a step; tighter ones take more steps and make fewer slips.
    "fast": {"entropy_bound": 0.3, "max_denoising_steps": 24, "confidence_threshold": 0.02},
    "balanced": {},
    "quality": {"entropy_bound": 0.03, "confidence_threshold": 0.002, "stability_threshold": 2},
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request. `None` means the checkpoint's own value (`generation_config.json`).

    Fields:
        max_new_tokens: tokens of the answer at most. Unset, no more than the model's context has room for.
        min_tokens: no end token is accepted before this many tokens.
        seed: every random number of the request follows from it; `None` draws one.
        temperature: multiplies the checkpoint's temperature schedule; 0 is greedy (argmax everywhere).
        top_p, top_k, min_p: restrict what a position may be sampled from: the smallest set of words of that
            probability, so many words, words at least that likely beside the likeliest. 1.0, `None`, 0.0: no limit.
        logit_bias: what is added to a token's score at every position: a mapping, kept as (token id, bias) pairs.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: token ids that end the answer, besides the checkpoint's own.
        max_denoising_steps: steps a canvas at most.
        entropy_bound: nats of summed entropy that one step may accept.
        t_min, t_max: the temperature schedule's last and first value.
        confidence_threshold: a canvas is done when its mean entropy (nats) is below this ...
        stability_threshold: ... and its argmax has not changed for this many steps.
        canvas_length: tokens settled at once; at most the checkpoint's own.
        mode: "diffusion", or "autoregressive" on the same weights.
        stop_at_end: whether a canvas is done when the part up to its first end token is.
        early_text: whether the first tokens of a canvas are given out, and then kept, before all of it is done: "off";
            "safe", when they have held for long; "eager", when they have held for a moment.
        logprobs: log-probabilities of the answer's tokens, with so many of the likeliest beside each (at most 20);
            None for none.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    max_new_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    confidence_threshold: float | None = None
    stability_threshold: int | None = None
    canvas_length: int | None = None
    mode: str = "diffusion"
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] | Mapping[int, float] = ()
    stop_at_end: bool = False
    early_text: str = "off"
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            entries = getattr(self, name)
            if not isinstance(entries, list | tuple):
                raise RequestError(f"{name}: {entries!r} is not a list")
            object.__setattr__(self, name, tuple(entries))
        _whole(self, "max_new_tokens", 1)
        _whole(self, "min_tokens", 0)
        _whole(self, "seed", -(2**63), 2**64 - 1)
        _number(self, "temperature", 0.0)
        _number(self, "top_p", 0.0, 1.0, above=True)
        _whole(self, "top_k", 1)
        _whole(self, "max_denoising_steps", 1)
        _number(self, "entropy_bound", 0.0, above=True)
        _number(self, "t_min", 0.0)
        _number(self, "t_max", 0.0)
        _number(self, "confidence_threshold", 0.0, above=True)
        _whole(self, "stability_threshold", 0)
        _whole(self, "canvas_length", 1)
        if self.mode not in MODES:
            raise RequestError(f"mode: {self.mode!r} is not one of {', '.join(MODES)}")
        _number(self, "min_p", 0.0, 1.0)
        _whole(self, "logprobs", 0, MOST_LOGPROBS)
        if not isinstance(self.stop_at_end, bool):
            raise RequestError(f"stop_at_end: {self.stop_at_end!r} is neither true nor false")
        if self.early_text not in EARLY_TEXT:
            raise RequestError(f"early_text: {self.early_text!r} is not one of {', '.join(EARLY_TEXT)}")
        try:
            pairs = tuple(sorted(dict(self.logit_bias).items()))
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias: {self.logit_bias!r} is not a mapping from token id to number") from None
        object.__setattr__(self, "logit_bias", pairs)
        for token, bias in pairs:
            if not _is_int(token) or token < 0:
                raise RequestError(f"logit_bias: {token!r} is not a token id")
            if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) <= MOST_BIAS:
                raise RequestError(f"logit_bias: {bias!r} for token {token} is not a number from -100 to 100")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop: every entry is a non-empty string, not {text!r}")
        for token in self.stop_token_ids:
            if not _is_int(token) or token < 0:
                raise RequestError(f"stop_token_ids: every entry is a token id, not {token!r}")

    @property
    def likely_alone(self) -> bool:
        """Whether words are drawn from the likelier ones alone."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> SamplingParams:
        """Builds the settings from plain keys; an unknown key is refused by name."""
        known = {f.name for f in fields(cls)}
        for key in settings:
            if key not in known:
                raise RequestError(f"{key}: no such sampling parameter (known: {', '.join(sorted(known))})")
        return cls(**settings)

    def resolve(self, defaults: GenerationConfig) -> GenerationConfig:
        """The checkpoint's defaults with this request's own values in their place.

        Raises:
            RequestError: the merged temperature schedule runs upwards (t_max < t_min).
        """
        names = {f.name for f in fields(GenerationConfig)} & {f.name for f in fields(self)}
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        merged = replace(defaults, **own)
        if merged.t_max < merged.t_min:
            raise RequestError(f"t_max: {merged.t_max} is below t_min {merged.t_min}; the schedule runs downwards")
        return merged

    def check_ids(self, vocab_size: int) -> None:
        """Refuses settings that name tokens which a model of so many words does not have."""
        named = {"stop_token_ids": self.stop_token_ids, "logit_bias": tuple(dict(self.logit_bias))}
        for name, tokens in named.items():
            for token in tokens:
                if token >= vocab_size:
                    raise RequestError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """A checkpoint's generation defaults; where `generation_config.json` is silent, the released model's values.

    A file that names no end or padding token means none, as in transformers.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    confidence_threshold: float = 0.005
    stability_threshold: int = 1
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GenerationConfig:
        """Reads the keys of `generation_config.json`; keys that dgemma has no use for are kept in `extra`."""
        data = dict(data)
        own: dict[str, Any] = {}
        sampler = data.pop("sampler_config", None)
        if sampler is not None:
            if not isinstance(sampler, dict):
                raise ConfigError("sampler_config: holds no JSON object")
            kind = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
            if "EntropyBound" not in str(kind):
                raise ConfigError(f"sampler_config: {kind} is not known (known: EntropyBoundSamplerConfig)")
            data["entropy_bound"] = sampler.get("entropy_bound")
        eos = data.pop("eos_token_id", None)
        if eos is not None:
            own["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        ids = [("eos_token_id", token) for token in own.get("eos_token_ids", ())]
        ids += [(name, data[name]) for name in ("pad_token_id", "bos_token_id") if data.get(name) is not None]
        for name, token in ids:
            if not _is_int(token) or token < 0:
                raise ConfigError(f"{name}: {token!r} is not a token id")
        for name in (f.name for f in fields(cls) if f.name not in ("eos_token_ids", "extra")):
            value = data.pop(name, None)
            if value is not None:
                own[name] = value
        try:
            # The same ranges hold for a file as for a request.
            checked = {f.name for f in fields(SamplingParams)} & own.keys()
            SamplingParams(**{name: own[name] for name in checked})
        except RequestError as error:
            raise ConfigError(str(error)) from None
        config = cls(**own, extra=data)
        if config.t_max < config.t_min:
            raise ConfigError(f"t_max: {config.t_max} is below t_min {config.t_min}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a `generation_config.json` that transformers reads too."""
        return {
            **self.extra,
            "max_new_tokens": self.max_new_tokens,
            "max_denoising_steps": self.max_denoising_steps,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": self.entropy_bound},
            "t_min": self.t_min,
            "t_max": self.t_max,
            "confidence_threshold": self.confidence_threshold,
            "stability_threshold": self.stability_threshold,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
        }

    @classmethod
    def read(cls, path: Path) -> GenerationConfig:
        """Reads a `generation_config.json`; a missing file means the defaults."""
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: holds no JSON object")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(params: object, name: str, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    if value is None:
        return
    if not _is_int(value) or value < low or (high is not None and value > high):
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name}: {value!r} is not a whole number {limit}")


def _number(params: object, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    value = getattr(params, name)
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > high or value < low or (above and value == low):
        limit = f"{'above' if above else 'of at least'} {low:g}" + (
            "" if high == math.inf else f" and at most {high:g}"
        )
        raise RequestError(f"{name}: {value!r} is not a number {limit}")
