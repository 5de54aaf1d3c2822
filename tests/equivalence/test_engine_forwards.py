"""How many forwards an answer takes, and over how many positions: nothing is computed that nobody looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dgemma.engine import Engine, Request
from dgemma.events import Result
from engines import answers, ask, attribute, engine_of, words
from tiny import SPECS, Lab

SPEC = SPECS["base"]  # canvases of 16


class Counts:
    """Positions that went through the layers, and through the head, by call."""

    def __init__(self) -> None:
        self.run: list[int] = []
        self.head: list[int] = []


@contextmanager
def counting(network: Any) -> Iterator[Counts]:
    counts, run, look, logits = Counts(), network.run, network.look, network.logits

    def count_run(x: torch.Tensor, view: Any) -> torch.Tensor:
        counts.run.append(x.shape[:-1].numel())
        return run(x, view)

    def count_look(hidden: torch.Tensor, *args: Any) -> Any:
        counts.head.append(len(hidden))
        return look(hidden, *args)

    def count_logits(hidden: torch.Tensor) -> torch.Tensor:
        counts.head.append(hidden.shape[:-1].numel())
        return logits(hidden)

    with (
        attribute(network, "run", count_run),
        attribute(network, "look", count_look),
        attribute(network, "logits", count_logits),
    ):
        yield counts


def counted(engine: Engine, request: Request) -> tuple[Result, Counts]:
    with counting(engine.network) as counts:
        (result,) = answers(engine, [request])
    return result, counts


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network("base")


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("new", [1, 16, 17, 40])
def test_a_forward_for_each_step_and_none_besides(network: Any, prompt: int, new: int) -> None:
    """The prompt, and each canvas that is committed, is encoded in the same forward as the next canvas's first step;
    the last canvas is never encoded, and the head sees canvases alone.
    """
    request = ask(network, words(SPEC, prompt), max_new_tokens=new)
    engine = engine_of(network)
    result, counts = counted(engine, request)
    steps = result.stats.steps_per_canvas
    assert len(steps) == -(-new // 16) and len(result.tokens) == new
    assert len(counts.run) == sum(steps)
    expected = []
    for index, count in enumerate(steps):
        expected += [16 + (16 if index else prompt)] + [16] * (count - 1)
    assert counts.run == expected
    assert sum(counts.head) == 16 * sum(steps)
    status = engine.status()
    assert (status.steps, status.forwards, status.tokens) == (sum(steps), sum(steps), new)
    assert result.stats.tokens_per_forward == pytest.approx(new / sum(steps))
    assert result.stats.prompt_tokens == status.prompt_tokens == prompt


@pytest.mark.parametrize(
    ("prompt", "step", "extra"), [(100, 40, 2), (100, 33, 3), (100, 100, 0), (16, 5, 0), (17, 5, 1)]
)
def test_a_long_prompt_takes_forwards_of_its_own(network: Any, prompt: int, step: int, extra: int) -> None:
    """Until what is left fits in a step, or is no longer than a canvas; none of them sees the head."""
    result, counts = counted(engine_of(network, step_tokens=step), ask(network, words(SPEC, prompt), max_new_tokens=16))
    steps = sum(result.stats.steps_per_canvas)
    assert len(counts.run) == extra + steps
    assert counts.run[:extra] == [step] * extra
    assert counts.run[extra:] == [prompt - extra * step + 16] + [16] * (steps - 1)
    assert sum(counts.head) == 16 * steps


@pytest.mark.parametrize("step", [7, 64])
def test_autoregressive_mode_takes_one_forward_a_token(network: Any, step: int) -> None:
    """And one more for each chunk of the prompt but the last; the head sees one position a token."""
    request = ask(network, words(SPEC, 30), mode="autoregressive", max_new_tokens=9)
    engine = engine_of(network, step_tokens=step)
    result, counts = counted(engine, request)
    chunks = {7: [7, 7, 16], 64: [30]}[step]  # 16 that are left are no more than a canvas
    assert counts.run == chunks + [1] * 8
    assert counts.head == [1] * 9
    assert len(result.tokens) == 9 and result.stats.steps_per_canvas == []
    assert engine.status().forwards == 0 and engine.status().tokens == 9


def test_a_batch_takes_the_forwards_of_its_longest(network: Any) -> None:
    """Sequences of a batch share each forward, whichever mode they are in."""
    requests = [ask(network, words(SPEC, 9 + n, seed=n), seed=n) for n in range(4)]
    requests.append(ask(network, words(SPEC, 8), mode="autoregressive", max_new_tokens=3))
    engine = engine_of(network)
    with counting(network) as counts:
        results = answers(engine, requests)
    steps = [sum(result.stats.steps_per_canvas) for result in results]
    assert len(counts.run) == max(steps) == engine.status().steps
    encoded = sum(9 + n + 16 for n in range(4)) + 8 + 2
    assert sum(counts.run) == encoded + 16 * sum(steps)
    assert sum(counts.head) == 16 * sum(steps) + 3
    assert engine.status().forwards == sum(steps)


def test_what_is_reused_goes_through_no_layer(network: Any) -> None:
    engine, prompt = engine_of(network, page_size=4), words(SPEC, 50)
    answers(engine, [ask(network, prompt, max_new_tokens=1)])
    result, counts = counted(engine, ask(network, prompt, seed=1, max_new_tokens=16))
    assert counts.run == [50 - 48 + 16] + [16] * (sum(result.stats.steps_per_canvas) - 1)


def test_a_stop_in_the_first_canvas_is_the_end(network: Any) -> None:
    """Nothing is encoded or denoised for the tokens that will not come."""
    free, _ = counted(engine_of(network), ask(network, words(SPEC, 9), max_new_tokens=64))
    stop = free.tokens[3]
    result, counts = counted(
        engine_of(network), ask(network, words(SPEC, 9), max_new_tokens=64, stop_token_ids=(stop,))
    )
    assert result.tokens == free.tokens[: free.tokens.index(stop)]
    assert len(counts.run) == result.stats.steps_per_canvas[0] == sum(result.stats.steps_per_canvas)
