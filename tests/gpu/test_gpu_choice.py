"""The door to the GPU's operations: what it chooses, and that contracts hold whichever way runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers, room, weight

from dgemma.kernels import gpu, plain, reference
from dgemma.kernels.wish import Wish


@pytest.mark.parametrize("form", ["float32", "fp8", "int4-32", "int8-8"])
def test_products(form: str) -> None:
    """The same through the door as in plain torch, also for groups that no kernel takes."""
    x = numbers(2, 3, 64)
    own = weight(form, 10, 64)
    near(gpu.linear(x, own), plain.linear(x.flatten(0, 1), own).view(2, 3, 10), room(form, 2e-6))
    gate_up, down = weight(form, 2 * 32, 64), weight(form, 64, 32, seed=1)
    tolerance = room(form, 2e-3, 2**-5) if form == "fp8" else 2e-6
    flat = x.flatten(0, 1)
    ones = torch.ones(len(flat), 1, device=DEVICE)
    found = gpu.experts(flat, ones, torch.zeros_like(ones, dtype=torch.int64), gate_up[None], down[None])
    near(found, plain.mlp(flat, gate_up, down), tolerance)


def test_choices_have_reasons() -> None:
    """A group of 8 has no kernel; FP8 on a card without `_scaled_mm` has."""
    assert gpu.choose("linear", weight("int8-8", 4, 32)).way == gpu.PLAIN
    assert gpu.choose("experts", weight("int4-32", 2, 4, 32)).way == gpu.TRITON
    assert gpu.choose("vocabulary", weight("int4-32", 4, 32)).way == gpu.PLAIN
    assert all("measured" in choice.reason for choice in gpu.CHOICES.values())


def test_old_cards_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 8.0 there are no kernels at all, below 8.9 none for FP8; AMD's cards count otherwise. The library's product
    in FP8 wants sizes that 16 divides."""
    network = torch.nn.Linear(32, 32)
    assert gpu.missing(network) is None
    fp8 = weight("fp8", 16, 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert gpu.missing(network) == "Tesla T4 has compute capability 7.5, and the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert gpu.missing(network) is None
    assert gpu.choose("linear", fp8).way == gpu.PLAIN and "8.9" in gpu.choose("linear", fp8).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.choose("linear", fp8).way == gpu.LIBRARY
    assert {gpu.choose("linear", weight("fp8", *shape)).way for shape in ((10, 32), (16, 40))} == {gpu.TRITON}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu.choose("linear", fp8).way == gpu.TRITON


def test_matrices_that_become_one_are_held_alike() -> None:
    """Queries in 4 bits beside keys in 8: said by name, so that plain torch runs instead."""
    module = torch.nn.Module()
    module.q_proj, module.k_proj, module.v_proj = (torch.nn.Linear(64, 32, bias=False) for _ in range(3))
    network = torch.nn.ModuleDict({"attention": module})
    assert gpu.missing(network) is None
    for name, form in (("q_proj", "int4-32"), ("k_proj", "int4-32"), ("v_proj", "int4-64")):
        part = getattr(module, name)
        del part._parameters["weight"]
        part.weight = weight(form, 32, 64)
    assert (
        gpu.missing(network) == "attention: q_proj, k_proj, v_proj are not held alike, and the kernels take them as one"
    )
    module.v_proj.weight = weight("int4-32", 32, 64)
    assert gpu.missing(network) is None


@pytest.mark.parametrize("form", ["float32", "int4-32"])
def test_vocabulary(form: str) -> None:
    """A table that the kernels take, and one that they do not."""
    hidden, table, wish = numbers(3, 32, scale=4.0), weight(form, 90, 32), Wish(heat=0.8, cap=10.0, bias=((4, 1.0),))
    look = gpu.vocabulary(hidden, table, wish)
    entries = table if isinstance(table, torch.Tensor) else table.dequantize()
    wanted, weights, totals = reference.read((hidden @ entries.T).cpu(), wish, None)
    assert torch.equal(look.found.argmax.cpu(), wanted.argmax)
    near(look.found.entropies, wanted.entropies.to(DEVICE), 1e-4)
    assert look.soft is not None
    near(look.soft, (weights / totals).to(DEVICE) @ entries, 1e-5)


def test_triton_is_loaded_by_kernels_alone() -> None:
    """Neither the door nor its choice among tensors loads it before a kernel is asked for."""
    code = "import sys, dgemma.kernels.gpu\nassert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
