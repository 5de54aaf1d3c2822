"""Restriction to likely words against the sampler's own, which sorts them. With a table of ones on its diagonal scores
are what is put in, and the blend is the probabilities.
"""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers
from torch import Tensor

from dgemma.diffusion.sampling import keep_likely
from dgemma.kernels.triton.vocabulary import step
from dgemma.quant import Quantized

WANTED = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (10**6, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.999, 0.0), (0, 1e-6, 0.0),
    (0, 1.0, 0.3), (0, 1.0, 1.0), (40, 0.8, 0.05), (3, 0.9, 0.9),
]  # fmt: skip


def diagonal(form: str, words: int) -> Tensor | Quantized:
    """A table of ones; with scales that differ from word to word, and codes that make up for them, in few bits."""
    if form != "int8":
        return torch.eye(words, dtype=getattr(torch, form), device=DEVICE)
    codes = 1 + torch.arange(words) % 100
    data = torch.diag(codes).to(DEVICE, torch.int8)
    return Quantized(bits=8, group=None, data=data, scales=(1.0 / codes[:, None]).to(DEVICE))


@pytest.mark.parametrize(
    ("form", "words", "sure"),
    [
        ("float32", 5, 1.0), ("float32", 300, 0.5), ("float32", 2100, 3.0),
        ("bfloat16", 300, 0.5), ("bfloat16", 300, 3.0), ("int8", 300, 3.0),
    ],
)  # fmt: skip
def test_likely_words(form: str, words: int, sure: float) -> None:
    """Sets of words, their probabilities, entropies and samples, of positions that want different things."""
    kind = torch.bfloat16 if form == "bfloat16" else torch.float32
    n = len(WANTED)
    hidden, heat, cap = numbers(n, words, dtype=kind, scale=sure), 0.8, 30.0
    uniform = torch.linspace(0, 1 - 2**-20, n, device=DEVICE)
    found = step(
        hidden, diagonal(form, words), heats=torch.full((n,), heat, device=DEVICE), cap=cap, tolerance=2.0**-25,
        uniform=uniform, likely=torch.tensor(WANTED, device=DEVICE),
    )  # fmt: skip
    exact, spare = (True, 2e-6) if kind == torch.float32 else (False, 2**-6)
    assert found.soft is not None
    for row, (k, p, share) in enumerate(WANTED):
        scores = torch.tanh(hidden[row].double().cpu() / cap) * cap / heat
        every = scores.softmax(dim=-1)
        wanted = keep_likely(scores, k or None, p, share) > float("-inf")
        kept = found.soft[row].cpu() > 0
        least, odd = every[wanted].min(), every[wanted != kept]
        assert odd.sum() <= spare or bool(((odd / least - 1).abs() <= spare).all())
        assert kept.any() and bool(kept[found.found.argmax[row]]) and bool(kept[found.found.sampled[row]])
        probabilities = scores.masked_fill(~kept, float("-inf")).softmax(dim=-1)
        near(found.soft[row].cpu(), probabilities.float(), 1e-5 if exact else 2**-6)
        entropy = -(probabilities * probabilities.clamp(min=1e-300).log()).sum()
        assert abs(float(found.found.entropies[row]) - float(entropy)) < (1e-4 if exact else 2e-2)


def test_what_is_not_restricted_is_as_it_was() -> None:
    """Beside others that are; and what is no number stays none."""
    table, hidden = numbers(300, 32), numbers(3, 32)
    hidden[2, 5] = float("nan")
    heats = torch.ones(3, device=DEVICE)
    plain = step(hidden, table, heats=heats, cap=30.0, tolerance=2.0**-25, uniform=heats * 0.4)
    wanted = torch.tensor([(0, 1.0, 0.0), (3, 1.0, 0.0), (3, 0.5, 0.0)], device=DEVICE)
    found = step(hidden, table, heats=heats, cap=30.0, tolerance=2.0**-25, uniform=heats * 0.4, likely=wanted)
    assert torch.equal(found.soft[0], plain.soft[0]) and found.found.entropies[0] == plain.found.entropies[0]
    assert found.found.entropies[1] < plain.found.entropies[1] and torch.isnan(found.found.entropies[2])
