"""A model without a network: it settles a given text out of noise and speaks the events that the real one does.

Run as a script it is the `dgemma` command with this model behind it, for tests in a process or a terminal of its own.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dgemma.errors import CheckpointError, RequestError
from dgemma.events import Commit, Draft, Early, Event, Finish, Result, Stats
from dgemma.params import SamplingParams

Invoke = Callable[..., Any]  # of the `invoke` fixture: arguments, input=… -> click.testing.Result
END = 0
STORY = (
    "Once upon a time a small fox lived at the edge of a wide forest. Every morning it ran to the river, where an old "
    "heron told it what the water had seen in the night.\n\n"
    "One day the heron was gone. The fox waited, and waited, and at noon it followed the river to the sea — naïve, "
    "perhaps, but brave. 海は広い, said a boat, and the fox 🦊 believed it.\n\n"
    "It never came back the same way. But on quiet mornings the water still tells the story, to whoever asks."
)


class FakeTokenizer:
    """Words, and single bytes of whatever is not ASCII; id 0 is the end mark."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = [b"<end>"]
        self.ids: dict[bytes, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of words with their leading space; non-ASCII characters byte by byte."""
        pieces: list[bytes] = []
        for match in re.finditer(r" ?[A-Za-z']+|[\x00-\x7f]|[^\x00-\x7f]", text):
            raw = match[0].encode()
            pieces += [raw] if raw.isascii() else [bytes([byte]) for byte in raw]
        return [self._id(piece) for piece in pieces]

    def decode(self, tokens: list[int], *, keep_special: bool = False) -> str:
        """Text of `tokens`; broken characters become U+FFFD."""
        known = [self.pieces[token] for token in tokens if token != END or keep_special]
        return b"".join(known).decode("utf-8", errors="replace")

    def _id(self, piece: bytes) -> int:
        if piece not in self.ids:
            self.ids[piece] = len(self.pieces)
            self.pieces.append(piece)
        return self.ids[piece]


class FakeModel:
    """Answers every prompt with `text`, or with what it was told when `text` is None."""

    name, directory, dtype, device = "fake", Path("/nowhere"), "float32", "cpu"
    end_token_ids = (END,)

    def __init__(self, text: str | None = STORY, *, canvas: int = 48, steps: int = 9, delay: float = 0.0):
        self.text, self.canvas, self.steps, self.delay = text, canvas, steps, delay
        self.tokenizer = FakeTokenizer()
        self.calls: list[dict[str, Any]] = []
        self.closed = 0

    def stream(
        self, prompt: Any, params: SamplingParams | None = None, *, think: bool = False, raw: bool = False
    ) -> Iterator[Event]:
        """Drafts, commits and the finish of an answer."""
        params = params or SamplingParams()
        self.calls.append({"prompt": prompt, "params": params, "think": think, "raw": raw})
        try:
            yield from self._run(prompt, params, think)
        finally:
            self.closed += 1

    def _run(self, prompt: Any, params: SamplingParams, think: bool) -> Iterator[Event]:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if "BOOM" in last:
            raise RuntimeError("the network\nfell over")
        if "REFUSE" in last:
            raise RequestError("seed: refused on request")
        if "WARN" in last:
            warnings.warn("the slow path\nis used", UserWarning, stacklevel=2)
        seed = 11 if params.seed is None else params.seed
        tokens = self.tokenizer.encode(f"You said: {last}" if self.text is None else self.text)
        limit = params.max_new_tokens or len(tokens)
        finish, tokens = ("length", tokens[:limit]) if limit < len(tokens) else ("stop", tokens)
        length = params.canvas_length or self.canvas
        steps = min(self.steps, params.max_denoising_steps or self.steps)
        counts, text, written = [], "", 0
        for canvas, start in enumerate(range(0, max(1, len(tokens)), length)):
            wanted = tokens[start : start + length]
            sure: list[int] = []
            for draft in self._settle(canvas, wanted, length, steps, seed):
                yield draft
                if params.early_text == "eager" and draft.step == steps - 3:
                    sure = wanted[: len(wanted) // 3]
                    early = self.tokenizer.decode(tokens[: written + len(sure)]).rstrip("\ufffd")
                    yield Early(canvas=canvas, steps=draft.step, tokens=sure, text=early[len(text) :])
                    text = early
            counts.append(steps)
            written += len(wanted)
            whole = self.tokenizer.decode(tokens[:written])
            whole = whole if written == len(tokens) else whole.rstrip("\ufffd")
            yield Commit(canvas=canvas, steps=steps, tokens=wanted[len(sure) :], text=whole[len(text) :])
            text = whole
        stats = Stats(
            prompt_tokens=5,
            new_tokens=len(tokens),
            steps_per_canvas=counts,
            tokens_per_forward=len(tokens) / sum(counts),
            tokens_per_second=float("inf"),
            seconds=0.5,
        )
        yield Finish(
            result=Result(
                text=text,
                tokens=tokens,
                finish_reason=finish,
                seed=seed,
                stats=stats,
                thoughts="hm, a fox\x1b[31m" if think else None,
            )
        )

    def _settle(self, canvas: int, wanted: list[int], length: int, steps: int, seed: int) -> Iterator[Draft]:
        rng = random.Random(f"{seed}:{canvas}")
        target = (wanted + [END] * length)[:length]
        ready = [rng.uniform(0.15, 0.85) * position / length + rng.uniform(0.1, 0.5) for position in range(length)]
        before = list(target)
        for step in range(1, steps + 1):
            time.sleep(self.delay)
            done = step / steps
            tokens, entropies = [], []
            for position in range(length):
                gap = max(0.0, ready[position] - done) if step < steps else 0.0
                sure = gap < 0.12
                tokens.append(target[position] if sure else rng.randrange(len(self.tokenizer.pieces)))
                entropies.append(0.002 if gap == 0 else 0.3 if sure else min(6.0, 1.0 + 7 * gap))
            settled = [entropy < 0.1 for entropy in entropies]
            changed = [now != then for now, then in zip(tokens, before, strict=True)]
            before = tokens
            yield Draft(
                canvas=canvas,
                step=step,
                max_steps=48,
                tokens=tokens,
                text=self.tokenizer.decode(tokens),
                settled=settled,
                changed=changed,
                entropies=entropies,
                mean_entropy=sum(entropies) / length,
                tokens_per_forward=len(wanted) / step,
            )


def load(name: str = "demo", *, device: str = "auto", dtype: str = "auto", threads: int | None = None) -> FakeModel:
    """Stands in for `dgemma.load`; the environment says what the model answers and how slowly."""
    if name != "demo":
        raise CheckpointError(f"{name}: no such directory")
    text = os.environ.get("FAKE_TEXT", STORY)
    canvas = int(os.environ.get("FAKE_CANVAS", "48"))
    return FakeModel(None if text == "ECHO" else text, canvas=canvas, delay=float(os.environ.get("FAKE_DELAY", "0")))


if __name__ == "__main__":
    from dgemma.cli import main

    sys.modules["dgemma"].load = load  # type: ignore[attr-defined]
    main()
