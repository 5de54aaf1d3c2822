"""The one door: load a model, then generate, stream or batch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import ModelConfig
from .engine import Answer, run
from .errors import CapacityError, CheckpointError, ConfigError, RequestError
from .events import Event, Finish, Result
from .model import Network
from .params import GenerationConfig, SamplingParams
from .text import ChatTemplate, Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model:
    """A loaded checkpoint: network, tokenizer, chat template, and the checkpoint's generation defaults.

    Fields:
        name: what it was loaded by; directory: where its files are.
        network: the torch module, for work below the level of text.
        tokenizer, chat: None where the checkpoint has no such file; token ids work without.
    """

    def __init__(self, name: str, directory: Path, network: Network):
        self.name, self.directory, self.network = name, directory, network
        self.tokenizer: Tokenizer | None = Tokenizer.read(directory)
        self.chat: ChatTemplate | None = ChatTemplate.read(directory)

    @property
    def config(self) -> ModelConfig:
        """The network's sizes."""
        return self.network.config

    @property
    def generation(self) -> GenerationConfig:
        """The checkpoint's defaults for what a request leaves unset."""
        return self.network.generation

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.network.dtype

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.generation.eos_token_ids

    def tokens_of(self, prompt: Prompt, *, think: bool = False, raw: bool = False) -> list[int]:
        """The ids that the network is given for a prompt.

        A text becomes one user message, messages go through the chat template, ids stay as they are. With `raw` a
        text is continued as it is, after the begin token and with control tokens that it spells out parsed.

        Raises:
            RequestError: the prompt is empty or of no known kind.
            CheckpointError: text is given and the checkpoint has no tokenizer or no chat template.
        """
        if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
            raise RequestError(f"prompt: {type(prompt).__name__} is neither text, nor chat messages, nor token ids")
        if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and _all_ids(prompt):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        if (isinstance(prompt, str) and not prompt.strip()) or not prompt:
            raise RequestError("prompt: is empty; say something")
        tokenizer = self._tokenizer()
        if raw:
            if not isinstance(prompt, str):
                raise RequestError("prompt: raw takes a text, not chat messages")
            ids = tokenizer.encode(prompt)
            begin = self.generation.bos_token_id
            return ids if begin is None or ids[:1] == [begin] else [begin, *ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.chat is None:
            path = self.directory / "chat_template.jinja"
            raise CheckpointError(f"{path}: no such file; without a chat template only raw text and token ids work")
        return self.chat.encode(tokenizer, messages, think=think)  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, think: bool = False, raw: bool = False
    ) -> Iterator[Event]:
        """One answer as it comes: a `Draft` a step, a `Commit` a canvas, one `Finish`. Closing it stops the run.

        Everything wrong with the request is raised here, before the first event.

        Raises:
            RequestError: the prompt or a setting cannot be honoured.
            CapacityError: prompt and answer do not fit the model's context.
            CheckpointError: the checkpoint lacks a file that text needs.
        """
        params = params or SamplingParams()
        if params.stop:
            self._tokenizer()
        answer = Answer(
            network=self.network,
            tokenizer=self.tokenizer,
            prompt=self.tokens_of(prompt, think=think, raw=raw),
            params=params,
            settings=params.resolve(self.generation),
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            think=think,
        )
        answer.check()
        return run(answer)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, think: bool = False, raw: bool = False
    ) -> Result:
        """One answer, whole. Arguments and errors are those of `stream`."""
        for event in self.stream(prompt, params, think=think, raw=raw):
            if isinstance(event, Finish):
                return event.result
        raise AssertionError("a stream ends with a Finish")

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        think: bool = False,
        raw: bool = False,
    ) -> list[Result]:
        """Answers in the order of the prompts, one after another for now. `params`: one for all, or one for each."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"params: {len(each)} settings for {len(prompts)} prompts")
        streams = [self.stream(p, own, think=think, raw=raw) for p, own in zip(prompts, each, strict=True)]
        return [event.result for events in streams for event in events if isinstance(event, Finish)]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a model directory that this package and transformers load; see `checkpoint.save_checkpoint`."""
        checkpoint.save_checkpoint(
            self.network,
            self.config,
            Path(directory),
            generation=self.generation,
            text_files=self.directory,
            source=self.directory,
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(f"{self.directory / 'tokenizer.json'}: no such file; without it only token ids work")
        return self.tokenizer


def load(
    name: str | os.PathLike[str] = "demo",
    device: str = "auto",
    dtype: str = "auto",
    *,
    threads: int | None = None,
) -> Model:
    """Loads a model.

    Args:
        name: "demo", a directory, or a Hugging Face id.
        device: "cpu", "cuda", "cuda:1", ... or "auto": a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": what `config.json` says, but float32 for a network of
            less than a billion weights on a CPU, where two bytes a weight save little and cost time.
        threads: CPU threads to compute with; None leaves torch's choice.

    Raises:
        ConfigError: an argument or `config.json` has a bad value.
        CheckpointError: files are missing, damaged or contradictory.
        CapacityError: the weights do not fit the device's memory.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads: {threads} is not a number of at least 1")
        torch.set_num_threads(threads)
    place = _device(device)
    directory = checkpoint.resolve(name)
    config = ModelConfig.read(directory / "config.json")
    generation = GenerationConfig.read(directory / "generation_config.json")
    small = place.type == "cpu" and config.total_parameters() < 1e9
    weights = DTYPES.get(dtype, torch.float32 if small else checkpoint.config_dtype(config))
    try:
        network = checkpoint.load_network(directory, config, device=place, dtype=weights)
    except (torch.OutOfMemoryError, MemoryError):
        size = config.total_parameters() * weights.itemsize / 1e9
        raise CapacityError(f"{directory}: {size:.1f} GB of weights do not fit the memory of {place}") from None
    network.generation = generation
    return Model(os.fspath(name), directory, network.eval().requires_grad_(False))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is unknown (auto, cpu, cuda, cuda:1, ...)") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported (auto, cpu, cuda, cuda:1, ...)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _all_ids(prompt: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
