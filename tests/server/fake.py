"""A model without a network that speaks to the server as the real one does: several canvases, each settling in steps.

What it answers follows from the prompt and the seed. Words in the last message ask for more: WEATHER for a tool call,
LONG for an answer without end, FULL, DRAINING, TOOLONG, REFUSE for errors at once, NAN and CRASH for errors under way,
EMPTY for no text at all; SHARED for 6 tokens of the prompt that were in the cache.

Run as a script it is the `dgemma` command with this model behind it.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dgemma.errors import CapacityError, Draining, QueueFull, RequestError
from dgemma.events import Commit, Draft, Early, Event, Finish, Result, Stats, TokenLogprob, ToolCall
from dgemma.params import SamplingParams

CANVAS = 16
STEPS = 4
WORDS = re.findall(r"\S+", "fox hill saw old stars fall into green water while naïve 🦊 birds sang on the ran over a")
SIZE = 257 + len(WORDS)


class FakeTokenizer:
    """Ids below 256 are bytes, id 256 ends an answer, the others are words with their space."""

    END = 256

    def __init__(self) -> None:
        self.words = [f" {word}" for word in WORDS]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for piece in re.findall(r" [^\s]+|.", text, re.DOTALL):
            ids += [257 + self.words.index(piece)] if piece in self.words else list(piece.encode())
        return ids

    def decode(self, ids: list[int], *, keep_special: bool = False) -> str:
        """Text of ids."""
        raw = b""
        for token in ids:
            if token < 256:
                raw += bytes([token])
            elif token == self.END:
                raw += b"<end>" if keep_special else b""
            else:
                raw += self.words[token - 257].encode()
        return raw.decode("utf-8", errors="replace")

    def token_of(self, token: int) -> str:
        """The token as a vocabulary spells it."""
        return f"<0x{token:02X}>" if token < 256 else self.decode([token], keep_special=True)


class FakeTicket:
    """One answer, made by a thread of its own whether or not anybody reads."""

    def __init__(self, model: FakeModel, last: str, call: dict[str, Any], seed: int, prompt_tokens: int):
        self.model, self.last, self.call, self.seed, self.prompt_tokens = model, last, call, seed, prompt_tokens
        self.params: SamplingParams = call["params"]
        self.steps_done = 0
        self.cancelled_at: float | None = None
        self.over = threading.Event()
        self._items: deque[Event | Exception | None] = deque()
        self._lock = threading.Lock()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def cancel(self) -> None:
        """Stops it before its next step."""
        if self.cancelled_at is None and not self.over.is_set():
            self.cancelled_at = time.monotonic()

    async def __aiter__(self) -> AsyncIterator[Event]:
        listener = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._listener = listener
        while True:
            with self._lock:
                item = self._items.popleft() if self._items else ()
                if item == ():
                    listener[1].clear()
            if item == ():
                await listener[1].wait()
            elif item is None:
                return
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    def _put(self, item: Event | Exception | None) -> None:
        with self._lock:
            self._items.append(item)
            if self._listener is not None and not self._listener[0].is_closed():
                self._listener[0].call_soon_threadsafe(self._listener[1].set)

    def _run(self) -> None:
        try:
            for event in self._events():
                self._put(event)
        except Cancelled:
            pass
        except Exception as error:
            self._put(error)
        self.over.set()
        self.model.left()
        self._put(None)

    def _events(self) -> Any:
        tokenizer, params = self.model.tokenizer, self.params
        text, thoughts, calls = self._answer()
        reason = "stop"
        ends = [text.index(stop) for stop in params.stop if stop in text]
        text = text[: min(ends)] if ends else text
        tokens = tokenizer.encode(text)
        budget = params.max_new_tokens or 64 * CANVAS
        if len(tokens) > budget:
            tokens, reason = tokens[:budget], "length"
        given, held, counts, told = 0, "", [], bool(thoughts)
        while True:
            canvas = len(counts)
            mine = tokens[given : given + CANVAS]
            for step in range(1, STEPS + 1):
                time.sleep(self.model.delay)
                while self.steps_done == self.model.hold and not self.model.free() and self.cancelled_at is None:
                    time.sleep(0.005)
                if self.cancelled_at is not None:
                    raise Cancelled
                self.steps_done += 1
                self.model.count(step=1)
                if "NAN" in self.last and canvas == 1:
                    raise RequestError("the network's scores are not numbers (NaN at position 3)")
                if "CRASH" in self.last and canvas == 1:
                    raise RuntimeError(f"a fault at {self.last}")
                if self.call["drafts"]:
                    yield self._draft(canvas, step, mine)
                if step == STEPS // 2 and params.early_text != "off" and len(mine) > 4:
                    piece, held = held + tokenizer.decode(mine[:4]), ""
                    yield self._delta(Early, canvas, step, mine[:4], piece, thoughts=thoughts if told else "")
                    told = False
                    given, mine = given + 4, mine[4:]
            given += len(mine)
            counts.append(STEPS)
            last = given >= len(tokens)
            # Something is held back until the end, as a stop string's possible beginning would be.
            piece = held + tokenizer.decode(mine)
            piece, held = piece[:-1], piece[-1:]
            more = {"thoughts": thoughts if told else "", "tool_calls": calls if last else ()}
            told = False
            yield self._delta(Commit, canvas, STEPS, mine, piece, **more)
            self.model.count(tokens=len(mine))
            if last:
                break
        stats = Stats(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=6 if "SHARED" in self.last else 0,
            new_tokens=len(tokens),
            steps_per_canvas=counts,
            tokens_per_forward=len(tokens) / sum(counts),
        )
        yield Finish(
            result=Result(
                text=tokenizer.decode(tokens),
                tokens=tokens,
                finish_reason=reason,
                seed=self.seed,
                stats=stats,
                thoughts=thoughts or None,
                tool_calls=calls,
                logprobs=None if params.logprobs is None else self._logprobs(tokens),
            )
        )

    def _answer(self) -> tuple[str, str, tuple[ToolCall, ...]]:
        greedy = self.params.temperature == 0
        rng = random.Random(f"{self.last} {0 if greedy else self.seed}")
        thoughts = f"I think about {len(self.last)} letters." if self.call["think"] else ""
        if "EMPTY" in self.last:
            return "", thoughts, ()
        if "WEATHER" in self.last and self.call["tools"]:
            names = [tool["function"]["name"] for tool in self.call["tools"]]
            return "", thoughts, tuple(ToolCall(name=name, arguments='{"city": "Oslo"}') for name in names[:2])
        count = 20_000 if "LONG" in self.last else 40
        text = "Once" + "".join(f" {rng.choice(WORDS)}" for _ in range(count)) + "."
        return text, thoughts, ()

    def _delta(self, kind: Any, canvas: int, steps: int, tokens: list[int], text: str, **more: Any) -> Any:
        logprobs = () if self.params.logprobs is None else self._logprobs(tokens)
        return kind(canvas=canvas, steps=steps, tokens=tokens, text=text, logprobs=logprobs, **more)

    def _logprobs(self, tokens: list[int]) -> tuple[TokenLogprob, ...]:
        count = self.params.logprobs or 0
        return tuple(
            TokenLogprob(
                token=token, logprob=-0.25, top=tuple(((token + at) % SIZE, -0.25 - at) for at in range(count))
            )
            for token in tokens
        )

    def _draft(self, canvas: int, step: int, mine: list[int]) -> Draft:
        tokens = (mine + [FakeTokenizer.END] * self.model.canvas)[: self.model.canvas]
        settled = [place < len(tokens) * step // STEPS for place in range(len(tokens))]
        return Draft(
            canvas=canvas,
            step=step,
            max_steps=48,
            tokens=tokens,
            text=self.model.tokenizer.decode(mine),
            settled=settled,
            changed=[not one for one in settled],
            entropies=[0.01 if one else 2.5 for one in settled],
            mean_entropy=1.25,
            tokens_per_forward=3.5,
        )


class Cancelled(Exception):
    """The ticket was cancelled."""


class FakeModel:
    """Stands in for `dgemma.Model`. With `hold`, answers wait after so many steps, until `free` says otherwise."""

    name = "fake"

    def __init__(
        self,
        *,
        delay: float = 0.002,
        canvas: int = CANVAS,
        context: int = 4096,
        hold: int | None = None,
        free: Callable[[], bool] = lambda: False,
    ):
        self.delay, self.canvas, self.hold, self.free = delay, canvas, hold, free
        self.tokenizer = FakeTokenizer()
        self.engine = SimpleNamespace(limit=context)
        self.config = SimpleNamespace(max_position_embeddings=context, canvas_length=canvas, vocab_size=SIZE)
        self.calls: list[dict[str, Any]] = []
        self.tickets: list[FakeTicket] = []
        self.draining = self.closed = self.started = False
        self.steps = self.tokens = self.prompt_tokens = 0
        self._running = 0
        self._changed = threading.Condition()

    def start(self) -> None:
        """Notes that it was called."""
        self.started = True

    def submit(self, prompt: Any, params: SamplingParams, **options: Any) -> FakeTicket:
        """Begins an answer."""
        call = {"prompt": prompt, "params": params, "think": False, "raw": False, "tools": None, "drafts": False}
        call |= options
        self.calls.append(call)
        last = _last_words(prompt)
        for word, error in {
            "FULL": QueueFull("256 requests are waiting; try again in a moment"),
            "DRAINING": Draining("the engine is shutting down"),
            "TOOLONG": CapacityError("prompt: 9000 tokens and max_new_tokens 512 exceed the model's context of 8192"),
            "REFUSE": RequestError("max_denoising_steps: refused"),
            "CANNOT": RequestError("max_new_tokens: refused"),
        }.items():
            if word in last:
                raise error
        if self.draining:
            raise Draining("the engine is shutting down")
        if not call["raw"] and not isinstance(prompt, str) and isinstance(prompt[0], dict):
            roles = [message["role"] for message in prompt]
            if "system" in roles[1:]:
                raise RequestError(f"messages[{roles.index('system', 1)}].role: a system message comes first")
            if roles[-1] not in ("user", "tool"):
                raise RequestError(f"messages[{len(roles) - 1}].role: the last message must be a user's or a tool's")
        if any(token >= self.config.vocab_size for token, _ in params.logit_bias):
            raise RequestError("logit_bias: it is not a token of this model")
        ids = prompt if isinstance(prompt[0], int) else self.tokenizer.encode(last)
        length = len(ids)
        if length + (params.max_new_tokens or 0) > self.config.max_position_embeddings:
            raise CapacityError(f"prompt: {length} tokens exceed the model's context")
        with self._changed:
            self._running += 1
            self.prompt_tokens += length
        seed = random.randrange(2**32) if params.seed is None else params.seed
        ticket = FakeTicket(self, last, call, seed, length)
        self.tickets.append(ticket)
        return ticket

    def left(self) -> None:
        """An answer is over."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def count(self, *, step: int = 0, tokens: int = 0) -> None:
        """Adds to the figures."""
        with self._changed:
            self.steps += step
            self.tokens += tokens

    def status(self) -> Any:
        """Figures."""
        return SimpleNamespace(
            queued=0,
            running=self._running,
            batch=self._running,
            steps=self.steps,
            forwards=self.steps,
            tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=0,
            preemptions=0,
            pages_used=self._running,
            pages=64,
            draining=self.draining,
        )

    def drain(self, seconds: float) -> bool:
        """Waits for what runs."""
        with self._changed:
            self.draining = True
            return self._changed.wait_for(lambda: not self._running, timeout=seconds)

    def close(self) -> None:
        """Notes that it was called."""
        self.closed = True


def _last_words(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(map(str, prompt)) if isinstance(prompt[0], int) else str(prompt[-1]["content"])


def load(name: str = "demo", **_: Any) -> FakeModel:
    """Stands in for `dgemma.load`; the environment says how slow it is, and for which file its answers wait."""
    if name == "nowhere":
        from dgemma.errors import CheckpointError

        raise CheckpointError("nowhere: no such directory")
    time.sleep(float(os.environ.get("FAKE_LOADING", "0")))
    file = os.environ.get("FAKE_HOLD")
    return FakeModel(hold=6, free=Path(file).exists) if file else FakeModel()


if __name__ == "__main__":
    import dgemma
    from dgemma.cli import main

    vars(dgemma).update(load=load, EngineSettings=dict)
    sys.argv[0] = "dgemma"
    main()
