"""Experts in host memory: no order that the events allow may show, and a network with them is the network without."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgemma import CapacityError, ConfigError, memory
from dgemma.checkpoint import load as module
from dgemma.checkpoint import load_network
from dgemma.config import ModelConfig
from dgemma.devices import check_offload
from dgemma.model import Network
from dgemma.model.moe import Experts
from dgemma.model.offload import Courier, ExpertStream, expert_bytes, shelved
from dgemma.quant import Quantized, quantize
from engines import answers, ask, engine_of, words
from late import LateCourier
from nvfp4 import nvfp4
from tiny import Spec, build

SPEC = Spec(
    name="offload", layers="sfsff", window=6, canvas=8, vocab=96, hidden=64, intermediate=96, heads=4, kv_heads=2,
    head_dim=16, global_head_dim=32, experts=4, top_k=2, moe_intermediate=32, mix=0.5, seed=22,
)  # fmt: skip
CPU = torch.device("cpu")


class Timetable(Courier):
    """A device with two streams that do nothing before `run`, and then all of it in any order that the events allow."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], None]] = []
        self.after: list[set[int]] = []
        self._last: dict[str, int] = {}
        self._awaited: dict[str, set[int]] = {"device": set(), "copies": set()}

    def issue(self, stream: str, act: Callable[[], None]) -> int:
        """Puts an act at the end of a stream."""
        self.acts.append(act)
        self.after.append(self._awaited[stream] | ({self._last[stream]} if stream in self._last else set()))
        self._last[stream], self._awaited[stream] = len(self.acts) - 1, set()
        return self._last[stream]

    def follow(self) -> None:
        if "device" in self._last:
            self._awaited["copies"].add(self._last["device"])

    def send(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        return self.issue("copies", lambda: Courier().send(pairs))

    def arrive(self, sent: int) -> None:
        self._awaited["device"].add(sent)

    def run(self, choose: Callable[[list[int]], int]) -> None:
        """Does everything; `choose` says which of the acts that could be next is."""
        done: set[int] = set()
        while len(done) < len(self.acts):
            ready = [n for n in range(len(self.acts)) if n not in done and self.after[n] <= done]
            number = choose(ready)
            self.acts[number]()
            done.add(number)


class Deaf(Timetable):
    """Copies do not wait for who reads."""

    def follow(self) -> None:
        pass


class Hasty(Timetable):
    """Who reads does not wait for copies."""

    def arrive(self, sent: int) -> None:
        pass


def layers(count: int) -> list[Experts]:
    """Layers of random experts, in floating point and in 4 bits by turns, those in whole numbers and in NVFP4."""
    config: Any = SimpleNamespace(num_experts=3, hidden_size=32, moe_intermediate_size=32)
    made = [Experts(config) for _ in range(count)]
    for number, own in enumerate(made):
        for name in ("gate_up_proj", "down_proj"):
            weight = torch.randn(getattr(own, name).shape, generator=torch.Generator().manual_seed(number))
            if number % 2:
                del own._parameters[name]
                small = nvfp4(*weight.shape, seed=number)
                setattr(own, name, small if number % 4 == 3 else quantize(weight, bits=4, group=32, search=False))
            else:
                getattr(own, name).data = weight
    return made


def plain(weight: Any) -> torch.Tensor:
    """A weight's values."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight.detach().clone()


def wrong(courier: Timetable, choose: Callable[[list[int]], int], count: int = 7) -> int:
    """How many of the layers of three forwards, the second of which ends early, find other weights than their own."""
    experts = layers(count)
    wanted = [(plain(own.gate_up_proj), plain(own.down_proj)) for own in experts]
    stream, bad = ExpertStream(experts, CPU, courier), []

    def reads(number: int, weights: tuple[Any, Any]) -> Callable[[], None]:
        def act() -> None:
            if not all(torch.equal(plain(own), right) for own, right in zip(weights, wanted[number], strict=True)):
                bad.append(number)

        return act

    for forward in range(3):
        stream.begin()
        for number, own in enumerate(experts[: 3 if forward == 1 else count]):
            courier.issue("device", lambda: None)  # attention
            courier.issue("device", reads(number, own.held()))
    courier.run(choose)
    return len(bad)


ORDERS: dict[str, Callable[[list[int]], int]] = {
    "as it was issued": min,
    "what was issued last first": max,
    **{f"random {seed}": random.Random(seed).choice for seed in range(12)},
}


def first_of(courier: Timetable, stream: str) -> Callable[[list[int]], int]:
    """Prefers one stream: copies as early as they may be, or as late."""
    names: dict[int, str] = {}
    issue = courier.issue

    def noted(name: str, act: Callable[[], None]) -> int:
        number = issue(name, act)
        names[number] = name
        return number

    courier.issue = noted  # type: ignore[method-assign]
    return lambda ready: min(ready, key=lambda number: (names[number] != stream, number))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("order", [*ORDERS, "copies first", "device first"])
def test_no_order_shows(order: str, count: int) -> None:
    """Nothing is read before it is there, nothing is overwritten before it is read."""
    courier = Timetable()
    choose = ORDERS.get(order) or first_of(courier, order.split()[0])
    assert wrong(courier, choose, count) == 0


def test_the_orders_find_what_does_not_wait() -> None:
    """Without either of the two waits some order shows."""
    deaf, hasty = Deaf(), Hasty()
    assert wrong(deaf, first_of(deaf, "copies")) > 0
    assert wrong(hasty, first_of(hasty, "device")) > 0


def test_a_copy_overlaps_the_layer_before() -> None:
    """The next layer's experts may set out before a layer has computed, and no earlier than their buffer is free."""
    courier, experts = Timetable(), layers(4)
    stream = ExpertStream(experts, CPU, courier)
    stream.begin()
    reads = []
    for own in experts:
        own.held()
        reads.append(courier.issue("device", lambda: None))
    copies = [number for number in range(len(courier.acts)) if number not in reads]

    def behind(number: int) -> set[int]:
        return courier.after[number].union(*(behind(before) for before in courier.after[number]))

    assert len(copies) == 4
    for layer in (2, 3):
        assert reads[layer - 2] in behind(copies[layer]) and reads[layer - 1] not in behind(copies[layer])


@pytest.mark.parametrize("spare", [0, 1, 100])
def test_layers_that_stay(spare: int) -> None:
    """The first ones, as many as fit beside the buffers of the others; they have their own weights."""
    experts = layers(6)
    wanted = [(plain(own.gate_up_proj), plain(own.down_proj)) for own in experts]
    stream = ExpertStream(experts, CPU)
    size = max(map(expert_bytes, experts))
    kept = stream.keep(spare * size)
    assert kept == memory.resident_layers([expert_bytes(own) for own in experts], (spare + 2) * size)
    assert (kept == 6) if spare == 100 else (spare <= kept < 6)
    assert stream.streamed == 6 - kept and [own.stream is None for own in experts] == [n < kept for n in range(6)]
    for _ in range(2):
        stream.begin()
        for own, right in zip(experts, wanted, strict=True):
            assert all(torch.equal(plain(found), part) for found, part in zip(own.held(), right, strict=True))
    assert stream.keep(100 * size) == 0  # a graph may know where they were


@pytest.mark.parametrize("sizes", [[5], [5, 5], [3, 9, 4], [2] * 9, [7, 1, 1, 8, 2, 3]])
def test_room_is_used_and_not_exceeded(sizes: list[int]) -> None:
    """Against trying every number of layers."""
    most = max(sizes)
    for room in range(2 * most, sum(sizes) + 3):
        fits = [n for n in range(len(sizes) + 1) if sum(sizes[:n]) + (0 if n == len(sizes) else 2 * most) <= room]
        assert memory.resident_layers(sizes, room) == max(fits)
    assert memory.streamed_bytes(100, sizes) == 100 - sum(sizes) + most * min(2, len(sizes))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SPEC, tmp_path_factory.mktemp("offload") / "checkpoint")


def loaded(directory: Path, **options: Any) -> Network:
    """The network of a directory."""
    config = ModelConfig.read(directory / "config.json")
    network = load_network(directory, config, **{"dtype": torch.float32, **options})
    return network.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore::dgemma.checkpoint.VisionIgnored")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "fp8"])
def test_the_tokens_of_the_network_without(form: str, directory: Path, tmp_path: Path) -> None:
    """In every format, with copies that come as late as they may."""
    options: dict[str, Any] = {"dtype": torch.bfloat16} if form == "bfloat16" else {}
    if "float" not in form:
        from dgemma.checkpoint.quantize import quantize_checkpoint
        from dgemma.quant import Policy

        quantize_checkpoint(directory, tmp_path / form, Policy(format=form))
        directory = tmp_path / form
    whole, streamed = (loaded(directory, offload=True, **options) for _ in range(2))
    assert whole.expert_stream is not None and streamed.expert_stream is not None
    assert whole.expert_stream.keep(1 << 40) == 5
    streamed.expert_stream._courier = late = LateCourier()
    requests = [ask(whole, words(SPEC, 3 + 5 * n, n), seed=n, max_new_tokens=12) for n in range(3)]
    wanted = [result.tokens for result in answers(engine_of(whole, step_tokens=12), requests)]
    assert [result.tokens for result in answers(engine_of(streamed, step_tokens=12), requests)] == wanted
    assert late.sent > 20
    if form == "float32":
        assert [result.tokens for result in answers(engine_of(loaded(directory)), requests)] == wanted


@pytest.mark.filterwarnings("ignore::dgemma.checkpoint.VisionIgnored")
def test_what_does_not_fit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that holds the network only while its experts are elsewhere is told of offload; one that does not, is
    not; a host too small for them is named. Nothing has been read by then."""
    network = loaded(directory)
    experts = [own.gate_up_proj.nbytes + own.down_proj.nbytes for own in network.modules() if isinstance(own, Experts)]
    total = sum(tensor.nbytes for tensor in network.state_dict().values())
    least = total - sum(experts) + 2 * max(experts)
    card = type("Card", (), {"total_memory": total - 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(module, "read_tensor", None)

    def refusal(**options: Any) -> str:
        with pytest.raises(CapacityError) as caught:
            loaded(directory, device=torch.device("cuda"), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert 'offload="experts"' in refusal() and "--offload experts" in refusal()
    card.total_memory = least
    assert 'offload="experts"' in refusal()
    card.total_memory = least - 1
    assert "--offload" not in refusal() and "experts of two layers" in refusal(offload=True)
    card.total_memory = total
    monkeypatch.setattr(module, "machine_memory", lambda: sum(experts) - 1)
    assert "of host memory" in refusal(offload=True)


def test_what_makes_no_sense() -> None:
    """An offload of something else, from a CPU, of a network in parts."""
    cuda = torch.device("cuda")
    check_offload(None, CPU, 2)
    check_offload("experts", cuda, 1)
    for offload, device, ranks, said in (
        ("layers", cuda, 1, "'layers'"),
        ("experts", CPU, 1, "on a CPU"),
        ("experts", cuda, 2, "in parts"),
    ):
        with pytest.raises(ConfigError, match=f"^offload: .*{said}"):
            check_offload(offload, device, ranks)


def test_no_more_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory that the system refuses is one line."""

    def refuse(*_: Any, **options: Any) -> torch.Tensor:
        assert options["pin_memory"]
        raise RuntimeError("CUDA error: out of memory\nat somewhere")

    weight = torch.zeros(4)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CapacityError, match=r"no more host memory for experts \(CUDA error: out of memory\)$"):
        shelved(weight, torch.device("cuda"))
