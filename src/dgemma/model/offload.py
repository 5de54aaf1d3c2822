"""Experts that stay in host memory, and are streamed to the device layer by layer while the layer before computes.

A forward goes through its layers in order, and 256 positions with 8 experts each leave few of 128 out: so whole layers
are sent, in turns into two buffers. Copies have a stream of their own. What is there is told by events alone, without
the host, so that a graph can hold all of it:

    layer     | 0       | 1         | 2         | 3
    computes  | waits for its copy, reads buffer 0, 1, 0, 1, ...
    copies    | 0 and 1 | -         | 2: waits  | 3: waits until layer 1 has been read
                                      until layer 0 has been read

A layer has been read when the next one asks for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CapacityError
from ..memory import BUFFERS, resident_layers
from ..quant import Quantized
from .moe import Experts

ALIGNMENT = 256  # bytes; as the device's own allocations begin
Weight = Tensor | Quantized


class Courier:
    """Brings tensors to a device, at once: what serves where copies have no stream of their own."""

    def follow(self) -> None:
        """What is sent from here on waits for all that the device was given so far."""

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copies each pair's second tensor into its first; returns what `arrive` takes."""
        for target, source in pairs:
            target.copy_(source)

    def arrive(self, sent: Any) -> None:
        """What the device is given from here on waits for what was sent."""


class CudaCourier(Courier):
    """Copies on a stream of its own; in a graph that is being recorded they become part of it."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def arrive(self, sent: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(sent)


class ExpertStream:
    """The experts of a network's layers, from the host to the device, for one forward at a time.

    `begin` opens each forward; each layer in its order then gets its weights from `lend`, and may read them until the
    next one asks for its own. A forward that ends early is forgotten by the next `begin`.

    Args:
        experts: of all layers, in order, with weights in host memory (`shelved`).
        device: where the network is.
        courier: None: what the device takes.
    """

    def __init__(self, experts: Sequence[Experts], device: torch.device, courier: Courier | None = None):
        self.device = device
        self._courier = courier or (CudaCourier(device) if device.type == "cuda" else Courier())
        self._streamed, self._begun, self._next = list(experts), False, 0
        self._sent: list[Any] = [None] * BUFFERS
        size = max(map(expert_bytes, self._streamed))
        count = min(BUFFERS, len(self._streamed))
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._slots = self._laid_out()
        for own in self._streamed:
            own.stream = self

    @property
    def streamed(self) -> int:
        """Layers whose experts are in host memory."""
        return len(self._streamed)

    def keep(self, room: int) -> int:
        """Moves the first layers' experts to the device for good, as many as `room` more bytes hold; returns how many.

        After the first forward nothing moves: a graph knows where everything was.
        """
        if self._begun:
            return 0
        sizes = [expert_bytes(own) for own in self._streamed]
        count = resident_layers(sizes, room + sum(buffer.nbytes for buffer in self._buffers))
        if count == len(sizes):  # their memory is counted upon
            self._buffers, self._slots = [], []
        for own in self._streamed[:count]:
            for name, weight in _weights(own).items():
                _put(own, name, _made_of(weight, [part.to(self.device) for part in _parts(weight)]))
            own.stream = None
        self._streamed = self._streamed[count:]
        self._slots = self._laid_out()
        return count

    def begin(self) -> None:
        """A forward begins: the first two layers' experts set out."""
        self._begun, self._next = True, 0
        if self._streamed:
            self._courier.follow()
            for number in range(len(self._buffers)):
                self._send(number)

    def lend(self, experts: Experts) -> tuple[Weight, Weight]:
        """A layer's two weights on the device, to be read until the next layer asks for its own."""
        number, self._next = self._next, self._next + 1
        assert number < len(self._streamed) and experts is self._streamed[number], "one forward at a time, from `begin`"
        if 0 < number < len(self._streamed) - 1:
            self._courier.follow()
            self._send(number + 1)  # to where the layer before was
        self._courier.arrive(self._sent[number % BUFFERS])
        return self._slots[number]

    def _send(self, number: int) -> None:
        pairs = [
            pair
            for target, source in zip(self._slots[number], _weights(self._streamed[number]).values(), strict=True)
            for pair in zip(_parts(target), _parts(source), strict=True)
        ]
        self._sent[number % BUFFERS] = self._courier.send(pairs)

    def _laid_out(self) -> list[tuple[Weight, Weight]]:
        """Each layer's weights at their places in its buffer."""
        slots = []
        for number, own in enumerate(self._streamed):
            buffer, start, made = self._buffers[number % BUFFERS], 0, []
            for weight in _weights(own).values():
                places = []
                for part in _parts(weight):
                    places.append(buffer[start : start + part.nbytes].view(part.dtype).view(part.shape))
                    start += _aligned(part.nbytes)
                made.append(_made_of(weight, places))
            slots.append((made[0], made[1]))
        return slots


def shelved(weight: Weight, device: torch.device) -> Weight:
    """A copy of a weight in host memory that a device can fetch while it computes: pinned, if the device is a GPU.

    Raises:
        CapacityError: the system does not give so much.
    """
    try:
        empty = [
            torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=device.type == "cuda")
            for part in _parts(weight)
        ]
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise CapacityError(f"offload: the system gives no more host memory for experts ({first})") from None
    return _made_of(weight, [own.copy_(part) for own, part in zip(empty, _parts(weight), strict=True)])


def expert_bytes(experts: Experts) -> int:
    """Bytes that a layer's experts take in a buffer."""
    return sum(_aligned(part.nbytes) for weight in _weights(experts).values() for part in _parts(weight))


def _weights(experts: Experts) -> dict[str, Weight]:
    found = {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    assert all(isinstance(weight, Tensor | Quantized) for weight in found.values())
    return found


def _put(experts: Experts, name: str, weight: Weight) -> None:
    if isinstance(weight, Tensor):
        experts.get_parameter(name).data = weight
    else:
        setattr(experts, name, weight)


def _parts(weight: Weight) -> list[Tensor]:
    return [weight.detach()] if isinstance(weight, Tensor) else list(weight.tensors.values())


def _made_of(weight: Weight, parts: Sequence[Tensor]) -> Weight:
    """A weight like another, of other tensors."""
    if isinstance(weight, Tensor):
        return parts[0]
    return replace(weight, **dict(zip(weight.tensors, parts, strict=True)))  # type: ignore[arg-type]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
