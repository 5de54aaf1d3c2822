"""Products in 4 and 8 bits: equal to their twins bit for bit, and near the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_weights import random_weight
from torch import Tensor
from torch.nn import functional as F

from dgemma.kernels import cpu, native, reference
from dgemma.kernels.packed import can_pack
from dgemma.quant import Quantized, quantize

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
widths = st.sampled_from([2, 6, 16, 30, 32, 46, 48, 64, 66, 96, 128, 192, 320, 704, 2112])
LAYOUTS = [(4, 64), (4, 32), (4, 16), (4, None), (8, None), (8, 64)]


def layouts(width: int) -> st.SearchStrategy[tuple[int, int | None]]:
    """Bits and groups that a width allows."""
    return st.sampled_from([(bits, group) for bits, group in LAYOUTS if not group or width % group == 0])


def exact(x: Tensor, weight: Quantized) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far rounding x to 8 bits and the kernel's float32 steps may carry from it."""
    dense = weight.dequantize().double()
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    size = x.double().abs() @ dense.abs().T
    return x.double() @ dense.T, step / 2 * dense.abs().sum(dim=-1) + 1e-5 * size + 1e-30


@many
@given(data=st.data(), rows=st.integers(1, 40), outputs=st.integers(1, 70), width=widths, half=st.booleans())
def test_linear(isa: str, data: st.DataObject, rows: int, outputs: int, width: int, half: bool) -> None:
    """Any shape and size of numbers."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    weight = random_weight((outputs, width), *data.draw(layouts(width)), generator)
    x = torch.randn(rows, width, generator=generator) * 10.0 ** data.draw(st.integers(-20, 20))
    x[data.draw(st.integers(0, rows - 1))] = 0.0
    x = x.bfloat16() if half else x
    packed = cpu.pack(weight)
    assert isinstance(packed, cpu.Packed)
    ours = cpu.linear(x, packed)
    assert ours.dtype == x.dtype
    assert torch.equal(ours, cpu.linear(x, weight))
    truth, bound = exact(x, weight)
    assert ((ours.double() - truth).abs() <= bound + (truth.abs() / 256 if half else 0)).all()


@pytest.mark.parametrize(("rows", "outputs", "width"), [(1, 704, 2816), (17, 2816, 704), (33, 48, 2112)])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, None)])
def test_linear_at_real_widths(isa: str, rows: int, outputs: int, width: int, bits: int, group: int | None) -> None:
    """Those of the released network."""
    generator = torch.Generator().manual_seed(rows)
    weight = quantize(torch.randn(outputs, width, generator=generator) * 0.02, bits=bits, group=group, search=False)
    x = torch.randn(rows, width, generator=generator)
    assert torch.equal(cpu.linear(x, cpu.pack(weight)), cpu.linear(x, weight))


@many
@given(
    seed=st.integers(0, 1 << 30),
    tokens=st.integers(0, 60),
    count=st.integers(1, 9),
    hidden=widths,
    width=st.sampled_from([2, 10, 48, 64, 96, 192, 704]),
    half=st.booleans(),
    data=st.data(),
)
def test_experts(
    isa: str, seed: int, tokens: int, count: int, hidden: int, width: int, half: bool, data: st.DataObject
) -> None:
    """Experts with many rows, one and none."""
    generator = torch.Generator().manual_seed(seed)
    k = data.draw(st.integers(1, min(count, 4)))
    gate_up = random_weight((count, 2 * width, hidden), *data.draw(layouts(hidden)), generator)
    down = random_weight((count, hidden, width), *data.draw(layouts(width)), generator)
    x = torch.randn(tokens, hidden, generator=generator)
    x = x.bfloat16() if half else x
    weights = torch.rand(tokens, k, generator=generator)
    order = torch.rand(tokens, count, generator=generator) * torch.arange(1, count + 1)  # the last ones more often
    experts = order.topk(k, dim=-1).indices
    ours = cpu.experts(x, weights, experts, cpu.pack(gate_up), cpu.pack(down))
    assert ours.dtype == x.dtype
    assert torch.equal(ours, cpu.experts(x, weights, experts, gate_up, down))


def plain_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, token by token, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, choice in torch.cartesian_prod(torch.arange(len(x)), torch.arange(experts.shape[1])).tolist():
        expert = experts[token, choice]
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        inner = F.gelu(gate, approximate="tanh") * up
        out[token] += weights[token, choice] * (down[expert].double() @ inner)
    return out


def test_experts_against_the_definition(isa: str) -> None:
    """What is left is the rounding of activations: 8 bits twice, so about one part in a hundred of the result."""
    generator = torch.Generator().manual_seed(3)
    gate_up = quantize(torch.randn(5, 192, 128, generator=generator) / 11, bits=4, group=64, search=False)
    down = quantize(torch.randn(5, 128, 96, generator=generator) / 10, bits=4, group=32, search=False)
    x, weights = torch.randn(30, 128, generator=generator), torch.rand(30, 2, generator=generator)
    experts = torch.randint(0, 4, (30, 2), generator=generator)  # the last expert has no rows
    ours = cpu.experts(x, weights, experts, cpu.pack(gate_up), cpu.pack(down)).double()
    truth = plain_experts(x, weights, experts, gate_up.dequantize(), down.dequantize())
    assert (ours - truth).norm() / truth.norm() < 0.02


def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    """A row alone, in a batch, and on any number of threads has the same bits."""
    generator = torch.Generator().manual_seed(4)
    weight = cpu.pack(random_weight((40, 128), 4, 64, generator))
    gate_up = cpu.pack(random_weight((6, 64, 128), 4, 64, generator))
    down = cpu.pack(random_weight((6, 128, 32), 8, None, generator))
    x, weights = torch.randn(50, 128, generator=generator), torch.rand(50, 2, generator=generator)
    experts = torch.randint(0, 6, (50, 2), generator=generator)
    before = torch.get_num_threads()
    try:
        products, sums = [], []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            products.append(cpu.linear(x, weight))
            sums.append(cpu.experts(x, weights, experts, gate_up, down))
    finally:
        torch.set_num_threads(before)
    for row in range(0, 50, 7):
        one = slice(row, row + 1)
        products.append(products[0].index_copy(0, torch.tensor([row]), cpu.linear(x[one], weight)))
        own = cpu.experts(x[one], weights[one], experts[one], gate_up, down)
        sums.append(sums[0].index_copy(0, torch.tensor([row]), own))
    assert all(torch.equal(products[0], other) for other in products)
    assert all(torch.equal(sums[0], other) for other in sums)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(isa: str, bad: float) -> None:
    """A broken row comes out as NaN, all of it, and the others as they were."""
    generator = torch.Generator().manual_seed(5)
    weight, x = random_weight((20, 64), 4, 64, generator), torch.randn(4, 64, generator=generator)
    sound = cpu.linear(x, cpu.pack(weight))
    x[2, 5] = bad
    ours = cpu.linear(x, cpu.pack(weight))
    assert ours[2].isnan().all() and cpu.linear(x, weight)[2].isnan().all()
    assert torch.equal(ours[[0, 1, 3]], sound[[0, 1, 3]])


@many
@given(data=st.data(), outputs=st.integers(1, 40), width=widths, count=st.integers(0, 3))
def test_packing_loses_nothing(isa: str, data: st.DataObject, outputs: int, width: int, count: int) -> None:
    """Unpacked it is what it was; a table's rows can be read from it."""
    generator = torch.Generator().manual_seed(outputs)
    shape = (count, outputs, width) if count else (outputs, width)
    weight = random_weight(shape, *data.draw(layouts(width)), generator)
    packed = cpu.pack(weight)
    assert isinstance(packed, cpu.Packed)
    again = cpu.unpack(packed)
    for name, tensor in weight.tensors.items():
        assert torch.equal(again.tensors[name].float(), tensor.float())
    assert again.group == weight.group and again.form == weight.form
    assert again.shape == weight.shape == packed.shape
    if not count:
        ids = torch.randint(0, outputs, (2, 5), generator=generator)
        assert torch.equal(packed.rows(ids), weight.dequantize()[ids])


def test_what_has_no_layout_is_done_by_the_twin(isa: str) -> None:
    """Floating-point values and odd groups come back unpacked, and the operations take them."""
    generator = torch.Generator().manual_seed(6)
    fp8 = Quantized(
        bits=8,
        group=None,
        data=torch.randn(10, 32, generator=generator).to(torch.float8_e4m3fn),
        scales=torch.rand(10, 1, generator=generator),
    )
    odd = random_weight((10, 32), 4, 8, generator)
    x = torch.randn(3, 32, generator=generator)
    for weight in (fp8, odd):
        assert not can_pack(weight) and cpu.pack(weight) is weight
        truth, bound = exact(x, weight)
        assert ((cpu.linear(x, weight).double() - truth).abs() <= bound).all()


def test_the_twins_own_functions() -> None:
    """Its exponential and gate, which the kernels equal bit for bit, against torch in float64."""
    x = torch.linspace(-87.0, 88.0, 300_001)
    truth = torch.exp(x.double())
    assert ((reference.exponential(x).double() - truth).abs() <= 2.5e-7 * truth).all()
    assert reference.exponential(torch.tensor([-87.1, -1e30, float("-inf")])).eq(0).all()
    gates, up = torch.linspace(-30, 30, 100_001), torch.linspace(-3, 3, 100_001)
    truth = F.gelu(gates.double(), approximate="tanh") * up.double()
    assert ((reference.gate(gates, up).double() - truth).abs() <= 2e-6 * truth.abs() + 1e-12).all()


def test_every_compiled_path_is_one_of_the_known() -> None:
    """The paths that this machine runs include the portable one."""
    library = native.library()
    assert library is not None
    running = native.running(library)
    assert running[-1] == "portable"
    assert set(running) <= {"avx512vnni", "avxvnni", "avx2", "neon", "portable"}


@many
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 15, 16, 17, 32, 100, 704, 2816]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    half=st.booleans(),
    scaled=st.booleans(),
)
def test_norm(isa: str, seed: int, rows: int, width: int, size: float, half: bool, scaled: bool) -> None:
    """Against float64; rows of nothing but zeros are zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, width, generator=generator) * size
    x[:, :1] = 0.0
    x = x.bfloat16() if half else x
    weight = torch.randn(width, generator=generator) if scaled else None
    truth = x.double() * (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    truth = truth if weight is None else truth * weight
    near = {"rtol": 2**-8 if half else 2e-6, "atol": 1e-30}
    for found in (cpu.norm(x, weight, 1e-6), reference.norm(x, weight, 1e-6)):
        assert found.dtype == x.dtype and torch.allclose(found.double(), truth, **near)


@many
@given(seed=st.integers(0, 1 << 30), rows=st.integers(0, 40), width=st.sampled_from([1, 15, 16, 96, 704]))
def test_gate(isa: str, seed: int, rows: int, width: int) -> None:
    """Two tensors, or the two halves of one; its twin's bits, and near the formula."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(rows, 2 * width, generator=generator) * 3
    gates, up = both.chunk(2, dim=-1)
    found = cpu.gate(gates, up)
    assert torch.equal(found, cpu.gate(gates.contiguous()[None], up.contiguous()[None])[0])
    assert torch.equal(found, reference.gate(gates, up))
    truth = F.gelu(gates.double(), approximate="tanh") * up.double()
    assert torch.allclose(found.double(), truth, rtol=1e-5, atol=1e-6)


def test_gradients_go_through_torch(isa: str) -> None:
    """Where they are wanted, the operations are those that have one."""
    x = torch.randn(3, 32, requires_grad=True)
    (cpu.norm(x, torch.ones(32), 1e-6).sum() + cpu.gate(x, x).sum()).backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
