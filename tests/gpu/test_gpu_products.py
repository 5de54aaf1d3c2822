"""Products of the GPU against their twins: formats, odd shapes."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import alike, near, numbers, room, weight

from dgemma.engine.fused import merged
from dgemma.kernels import plain
from dgemma.kernels.triton.common import operand
from dgemma.kernels.triton.linear import linear, ready, widened
from dgemma.model.linear import Linear

FORMS = ["float32", "bfloat16", "fp8", "int8", "int8-16", "int8-32", "int4-32", "int4-64", "nvfp4"]
DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 2**-7)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 5, 64), (19, 70, 128), (3, 17, 320)])
def test_linear(form: str, dtype: str, rows: int, outputs: int, inputs: int) -> None:
    """Every format, with rows and outputs that fill no tile."""
    kind, tolerance = DTYPES[dtype]
    x, own = numbers(rows, inputs, dtype=kind), weight(form, outputs, inputs)
    if form == "bfloat16" and kind == torch.float32:
        wanted = x @ own.float().T
    else:
        wanted = plain.linear(x, own.to(kind) if isinstance(own, torch.Tensor) else own)
    near(linear(x, own), wanted, max(tolerance, room(form, 0.0)))


def test_linear_with_odd_inputs_and_leading_axes() -> None:
    """Inputs that fill no tile, more axes, no rows at all."""
    for form in ("float32", "fp8", "int8"):
        own = weight(form, 7, 75)
        x = numbers(2, 3, 75)
        near(linear(x, own), plain.linear(x.flatten(0, 1), own).view(2, 3, 7), room(form, 2e-6))
        assert linear(x[:0], own).shape == (0, 3, 7)


def test_fp8_rows_are_those_of_torch() -> None:
    """The same bits, also for zeros, tiny numbers and what lies half-way."""
    x = numbers(9, 50)
    x[1], x[2], x[3, 1:] = 0.0, x[2] * 1e-20, 0.0
    x[4] = torch.linspace(0, 448, 50)
    x[5] = torch.arange(50) / 64.0
    x[5, 0] = 448.0
    found, scales = ready(x, operand(weight("fp8", 3, 50)))
    values, wanted = plain.fp8_rows(x)
    near(scales, wanted, 0.0)
    alike(found, values)
    alike(found.view(torch.uint8) & 127, values.view(torch.uint8) & 127)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4-32", "nvfp4"])
def test_matrices_that_become_one(form: str) -> None:
    """All that a weight is made of goes into the one, and each is a view of it with its own numbers."""
    modules = [Linear(64, outputs) for outputs in (5, 9, 2)]
    parts = [weight(form, own.out_features, 64, seed=n) for n, own in enumerate(modules)]
    for module, part in zip(modules, parts, strict=True):
        del module._parameters["weight"]
        module.weight = part
    whole = merged(*modules)
    wide = [own if isinstance(own, torch.Tensor) else own.dequantize() for own in (whole, *parts)]
    assert torch.equal(wide[0], torch.cat(wide[1:]))
    x = numbers(3, 64)
    if form != "bfloat16":
        near(linear(x, whole), torch.cat([linear(x, module.weight) for module in modules], dim=1), 2e-6)


@pytest.mark.parametrize("form", ["int4-32", "nvfp4", "int8", "int8-16"])
@pytest.mark.parametrize("inputs", [64, 320])
def test_widened_weights(form: str, inputs: int) -> None:
    """What the library multiplies where there are many rows: the same products, in whatever order inputs come."""
    x, own = numbers(4, inputs), weight(form, 70, inputs)
    taken = operand(own)
    near(ready(x, taken).values @ widened(taken, torch.float32).T, plain.linear(x, own), 2e-6)
