"""What an engine may use, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError

MEMORY_SHARE = 0.2  # of a machine's memory: what the cache takes at most by itself
KERNELS = ("auto", "triton", "torch")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How many requests at once, and how much memory for them.

    Fields:
        max_batch: requests that run at once; more wait.
        max_queue: requests that may wait; more are refused.
        max_model_len: tokens of a prompt and its answer at most; None for the model's own context.
        step_tokens: prompt tokens that are encoded in one step, of all requests together.
        page_size: tokens a page of the cache.
        cache_tokens: tokens that the cache holds in full layers; None for what `max_batch` requests of full length
            need, as far as a fifth of the machine's memory goes (nine tenths of what a GPU has free; half of that where
            experts are offloaded).
        prefix_reuse: whether what is encoded once is used again for requests that begin the same.
        kernels: "auto": on a GPU those for it if they take all of the network's weights, with canvases that stay on
            the card; "triton": those, or an error (with Triton's interpreter also on a CPU); "torch": none of them.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    max_batch: int = 16
    max_queue: int = 1024
    max_model_len: int | None = None
    step_tokens: int = 1024
    page_size: int = 256
    cache_tokens: int | None = None
    prefix_reuse: bool = True
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels: {self.kernels!r} is not one of {', '.join(KERNELS)}")
        for own in fields(self):
            value, optional = getattr(self, own.name), own.name in ("max_model_len", "cache_tokens")
            if own.name in ("prefix_reuse", "kernels") or (value is None and optional):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{own.name}: {value!r} is not a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class Status:
    """An engine's figures at one moment; counts are since its start.

    Fields:
        queued, running: requests.
        batch: requests in the last step.
        steps: forwards of the whole batch.
        forwards: denoising steps of single requests, added up.
        tokens: given to users.
        prompt_tokens, reused_tokens: of prompts, and how many of them needed no encoding.
        preemptions: requests that were put back for want of memory.
        pages_used, pages: of the cache's full layers.
        draining: whether new requests are refused.
    """

    queued: int
    running: int
    batch: int
    steps: int
    forwards: int
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    preemptions: int
    pages_used: int
    pages: int
    draining: bool
