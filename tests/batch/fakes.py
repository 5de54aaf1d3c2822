"""A model that answers at once: real tickets, no network. Run as a script it is the `dgemma` command with this model.

What it answers follows from the prompt and the seed alone. Words in a prompt ask for trouble: TOOLONG for a prompt
that does not fit, NAN for a request that fails under way, CRASH for an error that nobody foresees, BROKEN for one that
every request gets, ECHO for an answer as long as the prompt, KILL for the end of the process, with all that it has.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from dgemma.engine import EngineSettings, Ticket
from dgemma.errors import CapacityError, Draining, QueueFull, RequestError
from dgemma.events import Finish, Result, Stats
from dgemma.params import SamplingParams


def answer(prompt: Any, seed: int, params: SamplingParams) -> str:
    """What the model says."""
    mark = hashlib.sha256(f"{prompt!r} {seed} {params.temperature} {params.max_new_tokens}".encode()).hexdigest()[:12]
    said = repr(prompt) if "ECHO" in repr(prompt) else "second line"
    return f"answer {mark} – naïve 🦊\n{said}"


class FakeModel:
    """Settles `batch` requests a step, `delay` seconds each step; whoever came last first, to mix the order."""

    name, directory, device, dtype = "demo", Path("/nowhere"), "cpu", "float32"
    tokenizer = None
    config = "fake"

    def __init__(self, *, delay: float = 0.0, max_batch: int = 16, max_queue: int = 64):
        self.delay = delay
        self.engine = type("Engine", (), {"settings": EngineSettings(max_batch=max_batch, max_queue=max_queue)})()
        self.asked: list[Any] = []  # prompts, in the order that they were put in line
        self.waiting: deque[tuple[Ticket, str, SamplingParams, Any]] = deque()
        self.most = 0  # that were in line at once
        self.closes_after: int | None = None  # answers, after which the engine is closed
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """A thread settles requests from now on."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def close(self) -> None:
        """Nothing is left to end."""

    def submit(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        think: bool = False,
        raw: bool = False,
        tools: Any = None,
        drafts: bool = False,
    ) -> Ticket:
        """In line."""
        params = params or SamplingParams()
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"] if isinstance(prompt[0], dict) else ""
        if "TOOLONG" in last:
            raise CapacityError("prompt: 99 tokens and max_new_tokens 9 exceed the model's context of 100")
        if params.canvas_length and params.canvas_length > 256:
            raise RequestError(f"canvas_length: {params.canvas_length} is above the checkpoint's own of 256")
        ticket = Ticket(
            prompt_tokens=len(str(prompt)),
            seed=params.seed or 0,
            drive=self._drive,
            ensure_thread=self.start,
            cancel=self._cancel,
        )
        with self.changed:
            if len(self.waiting) >= self.engine.settings.max_batch + self.engine.settings.max_queue:
                raise QueueFull("full")
            self.asked.append(prompt)
            self.waiting.append((ticket, last, params, prompt))
            self.most = max(self.most, len(self.waiting))
            self.changed.notify_all()
        return ticket

    def map(self, requests: Any, params: SamplingParams | None = None, **named: Any) -> Any:
        """As the real one does it."""
        from dgemma.api import Model

        return Model.map(self, requests, params, **named)  # type: ignore[arg-type]

    def _drive(self) -> bool:
        if self.thread is not None:
            return False
        self._step()
        return True

    def _cancel(self, ticket: Ticket) -> None:
        with self.changed:
            self.waiting = deque(one for one in self.waiting if one[0] is not ticket)

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
            self._step()

    def _step(self) -> None:
        if self.delay:
            time.sleep(self.delay)
        with self.changed:
            batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.engine.settings.max_batch))]
        for ticket, last, params, prompt in reversed(batch):
            if "KILL" in last:
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.closes_after is not None and len(self.asked) - len(self.waiting) > self.closes_after:
                ticket.fail(Draining("the engine was closed"))
            elif "NAN" in last:
                ticket.fail(RequestError("scores: are not numbers (NaN)"))
            elif "CRASH" in last or os.environ.get("FAKE_BROKEN"):
                ticket.fail(RuntimeError("CUDA error: an illegal memory access was encountered"))
            else:
                text = answer(prompt, ticket.seed, params)
                stats = Stats(prompt_tokens=ticket.prompt_tokens, new_tokens=5, steps_per_canvas=[2])
                finish = "length" if params.max_new_tokens == 1 else "stop"
                tokens = [1, 2, 3, 4, 5]
                ticket.put(
                    Finish(result=Result(text=text, tokens=tokens, finish_reason=finish, seed=ticket.seed, stats=stats))
                )


if __name__ == "__main__":
    import dgemma
    from dgemma.cli import main

    fake = partial(FakeModel, delay=float(os.environ.get("FAKE_DELAY", "0")))
    vars(dgemma)["load"] = lambda *_args, **_named: fake()
    sys.argv[0] = "dgemma"
    main()
