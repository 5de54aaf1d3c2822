"""The one door: load a model, then generate, stream or batch."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import ModelConfig
from .devices import check_keep_packed, check_offload, device_of, devices_of
from .diffusion.generate import canvas_length, check_tokens
from .engine import Engine, EngineSettings, Request, Status, Team, Ticket, answers
from .errors import CapacityError, CheckpointError, ConfigError, RequestError
from .events import Event, Finish, Result
from .model import Network
from .params import GenerationConfig, SamplingParams
from .text import ChatTemplate, Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
LOOK_AHEAD = 2  # batches of requests that wait while one runs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model:
    """A loaded checkpoint: network, tokenizer, chat template, and the checkpoint's generation defaults.

    Fields:
        name: what it was loaded by; directory: where its files are.
        network: the torch module, for work below the level of text.
        tokenizer, chat: None where the checkpoint has no such file; token ids work without.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        network: Network,
        settings: EngineSettings | None = None,
        team: Team | None = None,
    ):
        self.name, self.directory, self.network = name, directory, network
        self._settings, self._team = settings, team
        self.tokenizer: Tokenizer | None = Tokenizer.read(directory)
        self.chat: ChatTemplate | None = ChatTemplate.read(directory)

    @cached_property
    def engine(self) -> Engine:
        """What runs the requests; made when the first one comes."""
        make = Engine if self._team is None else self._team.engine
        return make(self.network, self.tokenizer, self._settings)

    @property
    def config(self) -> ModelConfig:
        """The network's sizes, all ranks' together."""
        return self.network.config if self.network.ranks is None else self.network.ranks.config

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

    def tokens_of(
        self,
        prompt: Prompt,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids that the network is given for a prompt.

        A text becomes one user message, messages go through the chat template, ids stay as they are. With `raw` a
        text is continued as it is, after the begin token and with control tokens that it spells out parsed.

        Raises:
            RequestError: the prompt is empty or of no known kind.
            CheckpointError: text is given and the checkpoint has no tokenizer or no chat template.
        """
        if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
            raise RequestError(f"prompt: {type(prompt).__name__} is neither text, nor chat messages, nor token ids")
        are_ids = isinstance(prompt, Sequence) and not isinstance(prompt, str) and bool(prompt) and _all_ids(prompt)
        if tools and (raw or are_ids):
            raise RequestError("tools: need chat messages, neither raw text nor token ids")
        if are_ids:
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
        return self.chat.encode(tokenizer, messages, think=think, tools=tools)  # type: ignore[arg-type]

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        drafts: bool = False,
    ) -> Ticket:
        """Puts a request in line. The ticket gives its events, to a loop or to an event loop, and cancels it.

        Everything wrong with the request is raised here.

        Args:
            think: whether the model may think before it answers.
            raw: continue a text as it is, without the chat template.
            tools: functions that the model may call, in OpenAI's form.
            drafts: whether every step is told (`Draft`).

        Raises:
            RequestError: the prompt or a setting cannot be honoured.
            CapacityError: prompt and answer do not fit the model's context; `QueueFull`: too many requests wait.
            CheckpointError: the checkpoint lacks a file that text needs.
        """
        params = params or SamplingParams()
        if params.stop:
            self._tokenizer()
        settings = params.resolve(self.generation)
        tokens = self.tokens_of(prompt, think=think, raw=raw, tools=tools)
        check_tokens(self.network, torch.tensor([tokens]))
        params.check_ids(self.config.vocab_size)
        left = self.engine.limit - len(tokens)
        if left < 1:
            raise CapacityError(f"prompt: {len(tokens)} tokens leave no room in the context of {self.engine.limit}")
        if params.max_new_tokens is None:
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, left))
        if settings.max_new_tokens > left:
            raise CapacityError(
                f"prompt: {len(tokens)} tokens and max_new_tokens {settings.max_new_tokens} exceed the model's context "
                f"of {self.engine.limit}"
            )
        request = Request(
            prompt=tuple(tokens),
            params=params,
            settings=settings,
            canvas=canvas_length(self.network, params),
            limit=self.engine.limit,
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            think=think,
            drafts=drafts,
        )
        return self.engine.submit(request)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[Event]:
        """One answer as it comes: a `Draft` a step, a `Commit` a canvas, one `Finish`. Closing it stops the run.

        Arguments and errors are those of `submit`; what is wrong is raised here, before the first event.
        """
        ticket = self.submit(prompt, params, think=think, raw=raw, tools=tools, drafts=True)

        def events() -> Iterator[Event]:
            try:
                yield from ticket
            finally:
                ticket.cancel()

        return events()

    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> AsyncIterator[Event]:
        """`stream` for an event loop: `async for event in model.astream(...)`."""
        ticket = self.submit(prompt, params, think=think, raw=raw, tools=tools, drafts=True)
        try:
            async for event in ticket:
                yield event
        finally:
            ticket.cancel()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Result:
        """One answer, whole. Arguments and errors are those of `submit`."""
        return _result(self.submit(prompt, params, think=think, raw=raw, tools=tools))

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Result:
        """`generate` for an event loop; a task that is cancelled ends its request."""
        ticket = self.submit(prompt, params, think=think, raw=raw, tools=tools)
        try:
            async for event in ticket:
                if isinstance(event, Finish):
                    return event.result
        finally:
            ticket.cancel()
        raise AssertionError("a ticket that is not cancelled ends with a Finish")

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        think: bool = False,
        raw: bool = False,
    ) -> list[Result]:
        """Answers in the order of the prompts, computed together. `params`: one for all, or one for each."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"params: {len(each)} settings for {len(prompts)} prompts")
        return list(self.map(zip(prompts, each, strict=True), think=think, raw=raw))

    def map(
        self,
        requests: Iterable[Prompt | tuple[Prompt, SamplingParams | None]],
        params: SamplingParams | None = None,
        *,
        ordered: bool = True,
        errors: str = "raise",
        think: bool = False,
        raw: bool = False,
    ) -> Iterator[Any]:
        """Answers to prompts without end, computed together; prompts are taken only a little ahead of the answers.

        Args:
            requests: prompts, or pairs of a prompt and settings of its own.
            params: for those without their own.
            ordered: results in the order of the requests; if False, (number, result) as each is done.
            errors: "raise" ends it at the first request that fails; "return" gives the error in the result's place.

        Raises:
            RequestError, CapacityError, CheckpointError: those of `submit`.
        """

        def submit(one: Any) -> Ticket:
            pair = isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], SamplingParams | None)
            prompt, own = one if pair else (one, None)
            return self.submit(prompt, own or params, think=think, raw=raw)

        settings = self.engine.settings
        ahead = min(LOOK_AHEAD * settings.max_batch, settings.max_batch + settings.max_queue)
        return answers(requests, submit, ahead=ahead, ordered=ordered, errors=errors)

    def start(self) -> None:
        """Lets a thread of its own drive the engine from now on; otherwise whoever waits for an answer does."""
        self.engine.start()

    def status(self) -> Status:
        """The engine's figures."""
        return self.engine.status()

    def drain(self, seconds: float) -> bool:
        """Refuses new requests, waits so long for those that are here; returns whether all are done."""
        return self.engine.drain(seconds)

    def close(self) -> None:
        """Ends every request, and the engine."""
        self.engine.close()

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
    engine: EngineSettings | None = None,
    tensor_parallel: int = 1,
    offload: str | None = None,
    keep_packed: bool = False,
) -> Model:
    """Loads a model.

    Args:
        name: "demo", a directory, or a Hugging Face id.
        device: "cpu", "cuda", "cuda:1", ... or "auto": a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": what `config.json` says, but float32 on a CPU for a network
            of less than a billion weights or one in few bits, where two bytes a number save little and cost time.
        threads: CPU threads to compute with; None leaves torch's choice.
        engine: how many requests run at once, and how much memory they may take.
        tensor_parallel: processes that share the network, until `Model.close`; the main module must be importable.
        offload: "experts": those that a GPU has no room for stay in host memory, and are streamed to it; None: none do.
        keep_packed: of a model in few bits on a CPU, write the copy that later starts find and map, if there is none:
            `checkpoint/kept.py`. Where that fails a warning says so, and the model is loaded all the same.

    Raises:
        ConfigError: an argument or `config.json` has a bad value.
        CheckpointError: files are missing, damaged or contradictory.
        CapacityError: the weights do not fit the device's memory, or the host's.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads: {threads} is not a number of at least 1")
        torch.set_num_threads(threads)
    devices = [device] if tensor_parallel == 1 else devices_of(device, tensor_parallel)
    place = device_of(devices[0])
    check_offload(offload, place, tensor_parallel)
    check_keep_packed(keep_packed, place, tensor_parallel)
    directory = checkpoint.resolve(name)
    config = ModelConfig.read(directory / "config.json")
    generation = GenerationConfig.read(directory / "generation_config.json")
    little = config.total_parameters() < 1e9 or checkpoint.read_scheme(directory, config) is not None
    wide = place.type == "cpu" and little
    weights = DTYPES.get(dtype, torch.float32 if wide else checkpoint.config_dtype(config))
    team = None if tensor_parallel == 1 else Team(directory, config, generation, devices, weights)
    try:
        network = team.load() if team else checkpoint.load_network(
            directory, config, device=place, dtype=weights, offload=offload is not None, keep_packed=keep_packed
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        mend = "" if team or offload or place.type == "cpu" else '; offload="experts" (--offload experts) needs less'
        raise CapacityError(f"{directory}: its weights do not fit the memory that {place} has free{mend}") from None
    network.generation = generation
    return Model(os.fspath(name), directory, network.eval().requires_grad_(False), engine, team)


def _result(ticket: Ticket) -> Result:
    try:
        for event in ticket:
            if isinstance(event, Finish):
                return event.result
    finally:
        ticket.cancel()
    raise AssertionError("a ticket that is not cancelled ends with a Finish")


def _all_ids(prompt: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
