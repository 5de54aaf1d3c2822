"""What only a card would show: tensors that stay on the host, steps that cannot be recorded, waits. Without a card.

The engine and the kernels' wrappers run on a card that is not there (`pretend_card`), in every form of weights. Nothing
is computed but in one test, whose tokens come out of replays. `test_refused` shows that mistakes are seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tensors import DEVICE
from pretend_card import CARD, Graph, OnCard, Refused, pretended
from torch import distributed as dist

from dgemma.checkpoint.load import _put, empty_network
from dgemma.engine.card import CardForward
from dgemma.engine.inputs import Inputs, Parcel
from dgemma.kernels import gpu
from dgemma.kernels.triton import layer, routing
from dgemma.model.moe import Experts
from dgemma.model.offload import ExpertStream, shelved
from dgemma.model.ranks import Ranks
from engines import alone, answers, ask, engine_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from gpu_case import Maker
from gpu_kernels import cases
from gpu_weights import FORMS, config_of, network_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="there is a card")
HOST = torch.device("cpu")
MIX: list[dict[str, Any]] = [
    {"max_new_tokens": 20, "max_denoising_steps": 5},
    {"top_k": 5},
    {"mode": "autoregressive", "max_new_tokens": 3},
    {"drafts": True},
    {"early_text": "eager", "canvas_length": 5},
    {"logit_bias": {7: 3.0}, "min_tokens": 9, "stop_token_ids": (4,)},
    {"logprobs": 2},
    {"mode": "autoregressive", "max_new_tokens": 2, "top_p": 0.6},
]


@pytest.fixture(autouse=True)
def same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay's numbers that are no tensors are those of the recording, and its tensors have the same sizes."""
    pack = Parcel.pack

    def checked(own: Parcel, inputs: Inputs) -> None:
        assert [t.shape for t in own.here.tensors()] == [t.shape for t in inputs.tensors()]
        assert _numbers(own.here.layout) == _numbers(inputs.layout)
        pack(own, inputs)

    monkeypatch.setattr(Parcel, "pack", checked)
    monkeypatch.setattr(routing, "_tickets", {})


def _numbers(layout: Any) -> list[Any]:
    return [layout.encoded, *((kind, own.window, own.block, own.splits) for kind, own in layout.plans.items())]


def network(form: str, *, layers: int = 2, dtype: str = "bfloat16") -> Any:
    """A small one on the host."""
    return network_of(replace(config_of(layers, tiny=True), dtype=dtype), form, HOST).eval()


def carried(whole: Any, *, ranks: Ranks | None = None, offload: bool = False) -> Any:
    """The network on the card, or a part of it, or with its experts left behind."""
    own = empty_network(whole.config, ranks)
    for name, weight in {**dict(whole.named_buffers()), **dict(whole.named_parameters()), **whole.quantized()}.items():
        part = weight if ranks is None else ranks.cut(name, weight)
        _put(own, name, shelved(part, CARD) if offload and ".experts." in name else part.to(CARD))
    if offload:
        own.expert_stream = ExpertStream([module for module in own.modules() if isinstance(module, Experts)], CARD)
    return own.eval().requires_grad_(False)


def run(own: Any, mix: list[dict[str, Any]], kernels: str = "triton") -> list[list[int]]:
    """Answers to requests, all at once."""
    engine = engine_of(own, kernels=kernels, step_tokens=12)
    assert isinstance(engine._forward, CardForward) is (kernels == "triton")
    return [result.tokens for result in answers(engine, requests(own, mix))]


def requests(own: Any, mix: list[dict[str, Any]]) -> list[Any]:
    """Prompts from one token to more than a canvas, and more than a step takes."""
    calm = {"max_denoising_steps": 3, "stability_threshold": 9, "max_new_tokens": 9}
    return [ask(own, range(3, 4 + 7 * n), **{"seed": n, **calm, **wish}) for n, wish in enumerate(mix)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    """Canvases alone and beside commits, chunks of prompts, token by token, wishes of their own, drafts; on a card that
    is not the current one."""
    own, mix = network(form), MIX if form == "int4" else MIX[:3]
    with pretended(current=1) as card:
        found = run(carried(own), mix)
        found += run(carried(own), [{"mode": "autoregressive", "max_new_tokens": 7}])
    assert [len(tokens) for tokens in found] == [*[20, 9, 3, 9, 9, 9, 9, 2][: len(mix)], 7]
    assert sum(graph.replays for graph in card.graphs) > len(card.graphs) > 1


@pytest.mark.parametrize("form", ["bfloat16", "nvfp4"])
def test_plain_torch(form: str) -> None:
    """Without the kernels, whose place on a card plain torch may have to take."""
    own = network(form)
    with pretended():
        run(carried(own), MIX[:4], kernels="torch")


@pytest.mark.parametrize(
    ("wish", "steady"),
    [
        ({"max_denoising_steps": 6, "stability_threshold": 9, "max_new_tokens": 8}, (1, 1)),
        ({"mode": "autoregressive", "max_new_tokens": 8}, (2, 1)),
    ],
    ids=["canvas", "tokens"],
)
def test_a_step_waits_once(wish: dict[str, Any], steady: tuple[int, int]) -> None:
    """Nothing is sent inside a canvas, one piece for a token, and what the host wants to know comes back in one."""
    own = network("int8")
    with pretended() as card:
        engine = engine_of(carried(own), kernels="triton")
        engine.submit(ask(own, [3, 4, 5], **wish))
        seen = []
        while engine.step():
            seen.append((card.copies, card.waits))
            card.copies = card.waits = 0
    assert seen[3:5] == [steady] * 2


@pytest.mark.parametrize(("form", "free", "streamed"), [("bfloat16", 0, 4), ("int4", 90_000, 3)])
def test_experts_in_host_memory(form: str, free: int, streamed: int) -> None:
    """They come from pinned memory, within the graph, on a stream that is forked and joined."""
    own = network(form, layers=4)
    with pretended(free=free) as card:
        away = carried(own, offload=True)
        assert len(run(away, MIX[:3])[0]) == 20
    assert away.expert_stream.streamed == streamed
    assert sum(graph.replays for graph in card.graphs) > 3


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_one_of_two_ranks(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and joins are given what is on the card, in one piece, and are recorded; the other rank is silent."""
    told = []

    def all_reduce(x: torch.Tensor) -> None:
        assert isinstance(x, OnCard) and x.is_contiguous()
        told.append(x.mul_(1))

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor) -> None:
        assert all(isinstance(own, OnCard) and own.is_contiguous() for own in (x, *parts))
        told.append([part.copy_(x) for part in parts])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    own = network(form)
    with pretended() as card:
        part = carried(own, ranks=Ranks(rank=1, size=2, config=own.config))
        assert len(run(part, MIX[:4])[0]) == 20
    assert told and sum(graph.replays for graph in card.graphs) > 3


def test_kernels_one_by_one() -> None:
    """What `gpu-check` runs, and weights that are widened for many rows: on the card alone, and recorded."""
    config = replace(config_of(2, tiny=True), dtype="bfloat16")
    with pretended() as card:
        make = Maker(CARD, torch.bfloat16)
        for case in (case for own in cases(config, make, 2) for case in own()):
            for run in (case.ours, case.twin):
                assert all(isinstance(found, OnCard) for found in run())
            with card.record(Graph()):
                case.ours()
        for form in FORMS:
            weight, x = make.weight(form, 48, 64), make.numbers(gpu.MANY_ROWS, 64)
            gpu.linear(x, weight)
            with card.record(Graph()):
                gpu.linear(x, weight)
    assert "_widen_kernel" in card.launched


def test_the_same_tokens_out_of_replays() -> None:
    """Kernels run, memory that nobody has written holds no numbers, and steps are replayed with new canvases."""
    own = network("bfloat16", dtype="float32")
    mix = [{"canvas_length": 2, "max_new_tokens": 8, "max_denoising_steps": 2}]
    wanted = [result.tokens for result in alone(own, requests(own, mix))]
    with pretended(computes=True) as card:
        assert run(carried(own), mix) == wanted
    assert sum(graph.replays for graph in card.graphs) > 4


def mistakes() -> Iterator[tuple[Callable[[], Any], bool, bool]]:
    """What is done, and whether that is refused outside of a recording, and within."""
    x, rows, mask = (torch.ones(3, 8, device=CARD) for _ in range(3))
    flags, host, side = torch.zeros(3, dtype=torch.uint8, device=CARD), torch.ones(3, 8), torch.cuda.Stream()
    spots = torch.tensor([0, 2], device=CARD)
    mask = mask > 0

    def beside() -> None:
        with torch.cuda.stream(side):
            x.add_(1)

    layer.sound(x, flags)
    yield lambda: layer.sound(x, flags), False, False
    yield lambda: x.add_(1).mul(rows)[spots].to(torch.bfloat16), False, False
    yield lambda: torch.where(mask, x, 0.0).sum(dim=0), False, False
    yield lambda: x.__setitem__(0, 2.0), False, False
    yield lambda: layer.sound(x, flags.cpu()), True, True
    yield lambda: layer.sound(host, flags), True, True
    yield lambda: layer.sound(x.mT, flags), True, True
    yield lambda: layer.sound(x[:, :4].contiguous(), flags), False, True
    yield lambda: x + host, True, True
    yield lambda: torch.cat([x, host]), True, True
    yield lambda: x * torch.tensor(2.0), False, True
    yield lambda: x.cpu(), False, True
    yield lambda: x.copy_(host), False, True
    yield lambda: x.__setitem__(0, host[0]), False, True
    yield lambda: torch.tensor([1, 2], device=CARD), False, True
    yield lambda: host.to(CARD, non_blocking=True), False, True
    yield lambda: x[[0, 1]], False, True
    yield lambda: x[host[:, 0].long()], False, True
    yield lambda: x[mask], False, True
    yield lambda: mask.nonzero(), False, True
    yield lambda: x.tolist(), False, True
    yield lambda: float(x.sum()), False, True
    yield lambda: bool(mask.all()), False, True
    yield beside, False, True


@pytest.mark.parametrize("recorded", [False, True])
def test_refused(recorded: bool) -> None:
    """Mistakes are seen, and what is none is let through."""
    with pretended() as card:
        for number, (do, *refused) in enumerate(mistakes()):
            before = card.stream
            try:
                if recorded:
                    with card.record(Graph()):
                        do()
                else:
                    do()
            except Refused:
                assert refused[recorded], number
            else:
                assert not refused[recorded], number
            card.stream = before


def test_streams_are_joined() -> None:
    """A recording that leaves something behind on another stream is none."""
    with pretended() as card:
        x, side = torch.ones(3, device=CARD), torch.cuda.Stream(CARD)
        for joined in (True, False):

            def fork(joined: bool = joined) -> None:
                with card.record(Graph()):
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        x.add_(1)
                    if joined:
                        torch.cuda.current_stream().wait_stream(side)

            if joined:
                fork()
            else:
                with pytest.raises(Refused, match="not joined"):
                    fork()
