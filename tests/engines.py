"""Requests, engines and ways to drive them, for the tests of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dgemma
from dgemma.diffusion import CounterDraws, settle
from dgemma.diffusion.canvas import process, wish_of
from dgemma.engine import Engine, EngineSettings, Request, Ticket
from dgemma.events import Event, Finish, Result
from dgemma.params import GenerationConfig, SamplingParams
from dgemma.text import Tokenizer
from tiny import EOS, Lab, Spec, build, load_network, prompt

DEMO_FILES = Path(dgemma.__file__).parent / "demo"
# Canvases that settle after four steps or more, some not before the last one; no end token if none is asked for.
DEFAULTS = GenerationConfig(
    max_new_tokens=32, max_denoising_steps=8, entropy_bound=4.0, confidence_threshold=0.5, eos_token_ids=()
)
LEAST_CANVAS = 32


def words(spec: Spec, length: int, seed: int = 0) -> tuple[int, ...]:
    """A random prompt."""
    return tuple(prompt(spec, 1, length, seed=seed)[0].tolist())


def ask(network: Any, tokens: Sequence[int], *, limit: int = 4096, drafts: bool = False, **params: Any) -> Request:
    """A request as `Model.submit` makes it, on the defaults above."""
    own = SamplingParams(**{"seed": 0, **params})
    return Request(
        prompt=tuple(tokens),
        params=own,
        settings=own.resolve(DEFAULTS),
        canvas=own.canvas_length or network.config.canvas_length,
        limit=limit,
        seed=own.seed or 0,
        drafts=drafts,
    )


def engine_of(network: Any, tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    """An engine with a cache of some hundred tokens, if nothing else is said."""
    return Engine(network, tokenizer, EngineSettings(**{"cache_tokens": 1024, "page_size": 16, **settings}))


def result_of(events: Sequence[Event]) -> Result:
    """The result of a ticket that ran to its end."""
    assert isinstance(events[-1], Finish) and not any(isinstance(event, Finish) for event in events[:-1])
    return events[-1].result


def answers(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """All at once, driven by whoever waits."""
    return [result_of(list(ticket)) for ticket in [engine.submit(request) for request in requests]]


def alone(network: Any, requests: Sequence[Request], tokenizer: Tokenizer | None = None) -> list[Result]:
    """Each in an engine of its own."""
    return [answers(engine_of(network, tokenizer), [request])[0] for request in requests]


def drive(
    engine: Engine,
    requests: Sequence[Request],
    *,
    joins: Sequence[int] | None = None,
    before: Callable[[int, list[Ticket]], None] = lambda step, tickets: None,
    most: int = 5000,
) -> list[Ticket]:
    """Steps an engine by hand until all is done; request i is submitted at step `joins[i]`, in order of the list.

    Errors of a step are counted as a step, and the engine is driven on.
    """
    joins = joins or [0] * len(requests)
    tickets: dict[int, Ticket] = {}
    for step in range(most):
        for index, request in enumerate(requests):
            if joins[index] == step:
                tickets[index] = engine.submit(request)
        before(step, list(tickets.values()))
        try:
            moved = engine.step()
        except Injected:
            moved = True
        if not moved and len(tickets) == len(requests):
            return [tickets[index] for index in range(len(requests))]
    raise AssertionError("the engine does not come to an end")


class Injected(RuntimeError):
    """An error that a test lets happen."""


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An instance attribute for a while; what the class says comes back afterwards."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def assert_all_free(engine: Engine) -> None:
    """No page is in use, and none is lost."""
    for pool in (engine.pages.full, engine.pages.sliding):
        assert pool.available == pool.size
        taken = [pool.take() for _ in range(pool.size)]
        assert sorted(taken) == list(range(pool.size))
        for page in taken:
            pool.release(page)


class Watched:
    """A network that remembers what it said last."""

    def __init__(self, network: Any):
        self.network = network
        self.scores = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def denoise(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """As the network does it."""
        self.scores = self.network.denoise(*arguments, **named)
        return self.scores


Logs = list[torch.Tensor]


@torch.no_grad()
def loop(network: Any, request: Request) -> tuple[list[int], list[int], Logs]:
    """The readable loop, everything encoded afresh before each canvas or token: tokens, steps of each canvas, and for
    each token the log-probabilities of all words.
    """
    settings, params = request.settings, request.params
    ends = {*settings.eos_token_ids, *params.stop_token_ids}
    draws = CounterDraws([request.seed])
    history, tokens, steps, logs = list(request.prompt), [], [], []
    watched = Watched(network)

    def take(new: list[int], scores: torch.Tensor) -> bool:
        for token, row in zip(new, scores, strict=True):
            if token in ends or len(tokens) == settings.max_new_tokens:
                return True
            tokens.append(token)
            logs.append(torch.log_softmax(row.double(), dim=-1))
        return len(tokens) == settings.max_new_tokens

    while True:
        cache = network.new_cache(1)
        hidden = network.encode(torch.tensor([history]), cache)
        if params.mode == "autoregressive":
            scores = network.logits(hidden[:, -1:])
            barred = int(len(tokens) < params.min_tokens)
            processed = process(scores, params, wish_of(params, 1.0, ends, barred))
            greedy = params.temperature == 0
            chosen = processed.argmax(dim=-1) if greedy else draws.sample(len(tokens), 0, processed)
            new = [int(chosen)]
        else:
            missing = settings.max_new_tokens - len(tokens)
            room = LEAST_CANVAS * max(1, math.ceil(missing / LEAST_CANVAS))
            length = min(request.canvas, room, request.limit - len(history))
            index = len(steps)
            for step in settle(watched, cache, params, settings, length=length, index=index, draws=draws):
                new = step.committed[0].tolist()
            steps.append(step.number)
            scores = watched.scores
        history += new
        if take(new, scores[0]):
            return tokens, steps, logs


def mix(network: Any, spec: Spec) -> list[Request]:
    """Twelve requests that differ in all that a batch could confuse: lengths, settings, modes, shared beginnings."""
    shared = words(spec, 40, seed=99)
    # At low temperatures these networks say their last token again and again in this mode.
    auto: dict[str, Any] = {"mode": "autoregressive", "max_new_tokens": 12, "logprobs": 0}
    ends = tuple(range(3, 20))
    return [
        ask(network, words(spec, 1, seed=1), seed=1),
        ask(network, shared[:33], seed=2, max_new_tokens=40),
        ask(network, shared[:33] + words(spec, 5, seed=2), seed=3, temperature=0.0),
        ask(network, shared[:16] + words(spec, 20, seed=3), seed=4, top_k=8, max_new_tokens=20, logprobs=2),
        ask(network, shared, seed=5, early_text="eager"),
        ask(network, words(spec, 17, seed=4), seed=6, early_text="safe", min_p=0.02, canvas_length=7),
        ask(network, words(spec, 70, seed=5), seed=7, top_p=0.8, stability_threshold=0, max_new_tokens=1),
        ask(network, words(spec, 3, seed=6), seed=8, min_tokens=20, stop_at_end=True, stop_token_ids=(EOS, 9, 21)),
        ask(network, shared[:33], seed=9, temperature=4.0, **auto),
        ask(network, shared[:20] + words(spec, 31, seed=7), seed=10, temperature=6.0, top_k=10, **auto),
        ask(network, words(spec, 2, seed=8), seed=11, temperature=4.0, min_tokens=4, stop_token_ids=ends, **auto),
        ask(network, shared[:33], seed=2, logit_bias={5: 4.0, EOS: -100.0}, stop_token_ids=(11,)),
    ]


def talker(lab: Lab) -> tuple[Any, Tokenizer]:
    """A network that talks nonsense in the demo's tokens, and that tokenizer."""
    spec = Spec(name="talker", vocab=4096, hidden=32, window=20, mix=0.6, seed=40)
    directory = lab.root / spec.name
    if not directory.exists():
        build(spec, directory)
    tokenizer = Tokenizer.read(DEMO_FILES)
    assert tokenizer is not None
    return load_network(directory), tokenizer
