"""Attention over pages against the engine's own view of the same segments and pages, in plain torch."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers

from dgemma.config import FULL, SLIDING, AttentionShape
from dgemma.engine.pages import Pages, Table
from dgemma.engine.ragged import RaggedView, Segment, Store
from dgemma.kernels.triton.attention import attend, plan
from dgemma.kernels.triton.common import operand
from dgemma.model import Mode

CASES = {
    "canvas without prefix": [(0, 9, False)],
    "canvas": [(37, 20, False)],
    "prompt": [(0, 21, True)],
    "later chunk": [(30, 17, True)],
    "all at once": [(13, 6, True), (50, 33, False), (0, 4, True), (5, 1, False), (64, 1, True)],
}
WINDOW = 19


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("case", CASES)
def test_attend(case: str, kind: str, splits: int) -> None:
    """Segments at any place, pages in any order, windows, three heads to a key head, parts without keys."""
    check(CASES[case], kind, heads=6, kv_heads=2, width=24, size=8 if splits == 1 else 32, splits=splits)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 1, 512), (4, 2, 256), (2, 2, 48)])
def test_released_head_widths(heads: int, kv_heads: int, width: int) -> None:
    """The released network's, in few heads; and one that is no power of two."""
    check([(40, 12, False), (7, 9, True)], SLIDING, heads=heads, kv_heads=kv_heads, width=width, size=64, splits=2)


@pytest.mark.parametrize("loud", [1.0, 5.0])
@pytest.mark.parametrize(("kind", "window"), [(FULL, WINDOW), (SLIDING, 200)])
def test_many_tiles(kind: str, window: int, loud: float) -> None:
    """Tiles of keys that all rows see whole, and their edges; largest scores that grow slowly, and by leaps."""
    segments = [(300, 70, False), (190, 75, True), (64, 64, False)]
    check(
        segments, kind, heads=4, kv_heads=2, width=72, size=64, splits=2, window=window, loud=loud, tolerance=1e-5
    )  # fmt: skip


def test_bfloat16() -> None:
    """Sums stay in float32."""
    check(CASES["all at once"], FULL, heads=4, kv_heads=2, width=16, size=16, splits=2, dtype=torch.bfloat16)


def check(
    segments: list[tuple[int, int, bool]],
    kind: str,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    size: int,
    splits: int | None,
    dtype: torch.dtype = torch.float32,
    window: int = WINDOW,
    loud: float = 1.0,
    tolerance: float | None = None,
) -> None:
    shape = AttentionShape(kind=kind, heads=heads, kv_heads=kv_heads, head_dim=width, theta=1e4, rotary_fraction=1.0)
    pages = Pages(size=size, window=window, full=64, sliding=64)
    pages.full.take(), pages.sliding.take()
    tables = []
    for start, length, encoded in segments:
        table = Table(pages)
        table.reserve(start + length if encoded else max(1, start))
        tables.append(table)
    chosen = [t.sliding if kind == SLIDING else t.full for t in tables]
    store = Store.__new__(Store)
    store.size, store._sliding = size, [kind == SLIDING]
    store.keys = [numbers(64, kv_heads, size, width, dtype=dtype, seed=1, scale=width**-0.25)]
    store.values = [numbers(64, kv_heads, size, width, dtype=dtype, seed=2)]
    rows = sum(length for _, length, _ in segments)
    queries = numbers(rows, heads, width, dtype=dtype, seed=3, scale=width**-0.25 * loud)
    keys = numbers(rows, kv_heads, width, dtype=dtype, seed=4, scale=width**-0.25)
    values = numbers(rows, kv_heads, width, dtype=dtype, seed=5)
    modes = [
        Segment(t, s, n, Mode.ENCODE if e else Mode.DENOISE) for t, (s, n, e) in zip(tables, segments, strict=True)
    ]
    view = RaggedView(store, modes, window, torch.device(DEVICE))
    wanted = view.attend(0, shape, *(x.transpose(0, 1)[None] for x in (queries, keys, values)))[0].transpose(0, 1)
    if kind == SLIDING:  # pages behind the window are somebody else's, and need not hold numbers
        behind = [max(0, start - window + 1) // size for start, _, _ in segments]
        chosen = [[0] * count + pages[count:] for count, pages in zip(behind, chosen, strict=True)]
        store.keys[0][0] = store.values[0][0] = float("nan")
    own = plan(
        segments, chosen, group=heads // kv_heads, head_dim=width, kv_heads=kv_heads,
        window=window if kind == SLIDING else None, device=DEVICE, splits=splits,
    )  # fmt: skip
    found = attend(queries, keys, values, store.keys[0], store.values[0], own, operand(queries.flatten(1)))
    near(found.values, wanted.flatten(1), tolerance or (2e-6 if dtype == torch.float32 else 2**-6))


def test_splits_fill_a_card() -> None:
    """One canvas's keys are split, eight canvases' are not; short prefixes never are."""
    many = {"group": 8, "head_dim": 512, "kv_heads": 2, "window": None, "device": "cpu"}
    assert plan([(8192, 256, False)], [[0] * 32], **many).splits > 1
    assert plan([(8192, 256, False)] * 8, [[0] * 32] * 8, **many).splits == 1
    assert plan([(10, 100, False)], [[0]], **many).splits == 1
