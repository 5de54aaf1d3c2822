"""A card that is not there: tensors that say "cuda:0" and live on the host, and what torch and Triton do with them.

Every operation is seen before it is done, and what a card would refuse is `Refused`: a host's tensor beside a card's or
in a kernel, and while a graph is recorded, whatever waits for the card, comes from memory that is not pinned, has to be
compiled first, or is on a stream that was not forked from the recording one or is not joined. What is recorded is not
done but kept, and done by each replay, in the memory that it was recorded with. Kernels run in Triton's interpreter or,
which is faster, not at all: then what they would write stays zero. It is not the only card: who launches has to make it
the current one.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.interpreter import GridExecutor

CARD = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
FRESH = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.repeat_interleave}
STRIDED = {"cos", "sin"}  # what kernels take with a distance between rows
SAID = {"_sound_kernel": ("flags", 1)}  # what is written where kernels do not run, since the host acts on it
ALWAYS = {"_settle_kernel"}  # runs in any case, for the same reason
MOST_BLOCKS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


class Refused(AssertionError):
    """What a card would not do."""


class OnCard(Tensor):
    """A tensor on the card; `held` is where its numbers are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        """Where it is."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """As of other tensors; of a class of one's own torch leaves it to that."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return torch.nn.Parameter(self.clone(), requires_grad=False) if hasattr(self, "_is_param") else self.clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refused(f"{func}: there is no card any more")


class Generator(torch.Generator):
    """Says that it is where it was asked to be."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        own = super().__new__(cls)
        own.where = torch.device(device)
        return own

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        """Where."""
        return self.where


class Stream:
    """Knows whether it belongs to the recording, and whether that has waited for all that it was given."""

    def __init__(self, card: Card):
        self._card, self.recording, self.given, self.awaited = card, card.recording, 0, 0

    def wait_stream(self, other: Stream) -> None:
        """This one goes on when the other has done what it was given."""
        self.wait_event(other.record_event())

    def record_event(self) -> tuple[Stream, Any, int]:
        """What it was given up to now."""
        return self, self.recording, self.given

    def wait_event(self, event: tuple[Stream, Any, int]) -> None:
        """This one goes on when that is done."""
        other, recording, given = event
        if recording is not self._card.recording:
            raise Refused("a recording and the rest of the world wait for each other")
        self.recording, other.awaited = recording, max(other.awaited, given)


class Graph:
    """What was recorded, in order."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.replays = 0
        self.streams: set[Stream] = set()

    def replay(self) -> None:
        """Does it."""
        self.replays += 1
        for step in self.steps:
            step()


class Card(TorchDispatchMode):
    """The card.

    Fields:
        computes: whether kernels run.
        current: the number of the card that is launched on.
        recording: the graph that is being recorded.
        graphs: all that were.
        waits, copies: how often the host waited for it, and how often something was copied to or from it.
        launched: names of the kernels that were.
    """

    def __init__(self, computes: bool, current: int):
        super().__init__()
        self.current = current
        self.computes, self.recording, self.graphs = computes, None, []
        self.waits = self.copies = 0
        self.launched: set[str] = set()
        self._pinned: set[int] = set()
        self._compiled: set[Any] = set()
        self.stream = Stream(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is not compiled need not say so: to say it takes seconds of imports

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = dict(kwargs or {}), func.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        ours = [x for x in given if isinstance(x, OnCard)]
        # What is asked of a device without a number comes as that of the guard, "meta".
        here = bool(ours) if device is None else device.type == "cuda" or (kind in COPIES and device.type == "meta")
        if ours or here:
            self._check(func, kind, args, kwargs, here)
        if device is not None and here:
            kwargs["device"] = torch.device("cpu")
        inner, named = tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
        kept = here and self.recording is not None
        out = self._recorded(func, kind, inner, named) if kept else func(*inner, **named)
        if kind in FRESH and here:
            self._spoil(out)
        if pinned and not here:
            self._pinned.add(out.untyped_storage().data_ptr())
        if not here:
            return out
        known = {id(x.held): x for x in ours}
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnCard(x), out)

    def _check(self, func: Any, kind: Any, args: Any, kwargs: Any, here: bool) -> None:
        """Refuses what a card would, and counts."""
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        away = [x for x in leaves if not isinstance(x, OnCard)]
        if kind in COPIES:
            if len({isinstance(x, OnCard) for x in leaves} | {here}) > 1:
                steady = bool(kwargs.get("non_blocking")) or (kind is aten.copy_ and len(args) > 2 and args[2])
                host = [x.untyped_storage().data_ptr() for x in away]
                if self.recording is not None and not (steady and host and self._pinned.issuperset(host)):
                    raise Refused(f"{func} between host and card in a recording")
                self.copies += 1
                self.waits += not (here and isinstance((args[0] if kind is aten.copy_ else None), OnCard | None))
            return
        masks = kind in (aten.index, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        filled = masks and kind is aten.index_put_ and args[2].dim() == 0
        if kind in WAITS or (masks and not filled):
            if self.recording is not None:
                raise Refused(f"{func} waits for the card in a recording")
            self.waits += 1
        if kind in (aten.index, aten.index_put_) and self.recording is None:
            self.copies += len(away)
            return
        wrong = [x for x in away if x.dim() or (self.recording is not None and kind is not aten.fill_)]
        if wrong:
            raise Refused(f"{func}: a tensor {list(wrong[0].shape)} of the host among the card's")

    def _spoil(self, fresh: Tensor) -> None:
        """Memory that nobody has written: no numbers where kernels run."""
        if fresh.dtype.itemsize == 1 and fresh.is_floating_point():
            fresh.view(torch.uint8).fill_(127 if self.computes else 0)
        else:
            fresh.fill_(float("nan") if self.computes and fresh.is_floating_point() else 0)

    def _recorded(self, func: Any, kind: Any, args: Any, kwargs: Any) -> Any:
        """Keeps an operation for replays; what it changes is not changed now."""
        if func._schema.is_mutable:
            assert func.overloadpacket.__name__.endswith("_"), f"{func} is not for recordings"
            self._keep(lambda: func(*args, **kwargs))
            return args[0]
        out = func(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if kind not in FRESH and not any(x.untyped_storage().data_ptr() in held for x in outs):

            def again() -> None:
                for old, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            self._keep(again)
        return out

    def _keep(self, step: Callable[[], Any]) -> None:
        if self.stream.recording is not self.recording:
            raise Refused("a stream that was not forked from the recording one")
        self.stream.given += 1
        self.recording.streams.add(self.stream)
        self.recording.steps.append(step)

    def launch(self, run: Callable[..., Any], executor: GridExecutor, args: Any, kwargs: Any) -> None:
        """A kernel, in its interpreter's place."""
        name, signature = executor.fn.__name__, inspect.signature(executor.fn)
        bound = signature.bind(*args, **{key: x for key, x in kwargs.items() if key in signature.parameters})
        for own, x in bound.arguments.items():
            if isinstance(x, Tensor) and not isinstance(x, OnCard):
                raise Refused(f"{name}: {own} is a tensor of the host")
            if isinstance(x, OnCard) and not (x.is_contiguous() or (own in STRIDED and x.stride(-1) == 1)):
                raise Refused(f"{name}: {own} is not in one piece: {list(x.shape)} by {x.stride()}")
        if self.current != CARD.index:
            raise Refused(f"{name}: launched on another card")
        grid = executor.grid
        if any(count > most for count, most in zip(grid, MOST_BLOCKS, strict=False)):
            raise Refused(f"{name}: a grid of {grid}")
        self.launched.add(name)
        variant = name, tuple(_specialised(x, own in executor.constexprs) for own, x in bound.arguments.items())
        if self.recording is not None and variant not in self._compiled:
            raise Refused(f"{name} would be compiled within a recording")
        self._compiled.add(variant)
        held = [x.held if isinstance(x, OnCard) else x for x in args]

        def step() -> None:
            if self.computes or name in ALWAYS:
                run(executor, *held, **kwargs)
            elif name in SAID:
                bound.arguments[SAID[name][0]].held.fill_(SAID[name][1])

        if self.recording is None:
            step()
        else:
            self._keep(step)

    @contextmanager
    def record(self, graph: Graph, **_: Any) -> Iterator[None]:
        """In the place of `torch.cuda.graph`."""
        before, self.recording = self.stream, graph
        self.graphs.append(graph)
        self.stream = Stream(self)
        try:
            yield
            if any(own.awaited < own.given for own in graph.streams - {self.stream}):
                raise Refused("a stream is not joined")
        finally:
            self.stream, self.recording = before, None

    @contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        """In the place of `torch.cuda.device`."""
        before, self.current = self.current, device.index or 0
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """In the place of `torch.cuda.stream`."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


@contextmanager
def pretended(*, computes: bool = False, free: int = 1 << 40, current: int = 0) -> Iterator[Card]:
    """A card for a while, in this thread.

    Args:
        free: bytes that it says it has left.
        current: the number of the card that is launched on at first; 1: another one.
    """
    card, launch = Card(computes, current), GridExecutor.__call__
    known = {"total_memory": free, "name": "none", "major": 9, "multi_processor_count": 132}
    known |= {"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10}
    stands = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: card.current,
        "device": card.at,
        "get_device_name": lambda *_: "a card that is not there",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(**known),
        "mem_get_info": lambda *_: (free, free),
        "max_memory_allocated": lambda *_: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": lambda *_: Stream(card),
        "current_stream": lambda *_: card.stream,
        "stream": card.on,
        "graph": card.record,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
    }
    with pytest.MonkeyPatch.context() as patch, _guard():
        for name, stand in stands.items():
            patch.setattr(torch.cuda, name, stand)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "_scaled_mm", scaled_mm)
        patch.setattr(GridExecutor, "__call__", lambda own, *args, **kwargs: card.launch(launch, own, args, kwargs))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with card:
                yield card
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def _specialised(x: Any, constant: bool) -> Any:
    """What Triton compiles a kernel anew for."""
    if isinstance(x, OnCard):
        return x.dtype, x.data_ptr() % 16 == 0
    return x if constant or not isinstance(x, int) else (x == 1, x % 16 == 0, abs(x) < 2**31)


def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`torch._scaled_mm` by row, with what a card wants of its arguments."""
    (rows, inner), (_, columns) = a.shape, b.shape
    if inner % 16 or columns % 16:
        raise Refused(f"torch._scaled_mm of {list(a.shape)} and {list(b.shape)}")
    assert a.is_contiguous() and b.mT.is_contiguous() and out_dtype == torch.bfloat16
    assert scale_a.shape == (rows, 1) and scale_b.shape == (1, columns)
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


@contextmanager
def _guard() -> Iterator[None]:
    """A build of torch for a CPU knows no way to enter a CUDA device; that of "meta", which does nothing, will do."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    slots: Sequence[Any] = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    slots[1] = slots[14]  # c10::DeviceType::CUDA and Meta
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        slots[1] = None
