"""The operations on a GPU that more than one thing can run: the same names and contracts as in `cpu`.

Each call runs a Triton kernel, a library's, or plain torch (`plain`, `reference`); `choose` says which and why. Nothing
here loads Triton before a kernel of it runs. Attention, routing and what lies between have kernels alone, in `triton`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear

from ..quant import Quantized
from . import plain, reference
from .cpu import TOLERANCE, Look
from .packed import Packed
from .plain import Weight
from .wish import Wish

if TYPE_CHECKING:
    from .triton.common import Operand
    from .triton.linear import Ready

LEAST_CAPABILITY, FP8_CAPABILITY, ANY_CAPABILITY = (8, 0), (8, 9), (99, 0)
TRITON, LIBRARY, PLAIN = "triton", "library", "plain"


class Choice(NamedTuple):
    """What runs an operation, and why."""

    way: str
    reason: str


# By operation and form of the weight, on cards that Triton compiles for. Microseconds were measured on an H100 at the
# 26B's sizes, with 256 rows where nothing else is said; records are in benchmarks/results/2026-11-27-nvidia-h100-*.
# The vocabulary's are from before its blend became a plain product, and from before tiles were chosen.
CHOICES = {
    ("linear", "float"): Choice(LIBRARY, "8192 x 2816: measured 29, ours 35"),
    ("linear", "fp8"): Choice(LIBRARY, "8192 x 2816: measured 20, ours 21; with 2,048 rows 83 and 120"),
    ("linear", "int8"): Choice(TRITON, "torch has none for weights alone in 8 bits; 4096 x 2816: measured 35"),
    ("linear", "int4"): Choice(TRITON, "torch's wants another layout than the files'; 8192 x 2816: measured 33"),
    ("experts", "float"): Choice(TRITON, "measured 558, torch's grouped products 618; with 2,048 rows 735 and 871"),
    ("experts", "fp8"): Choice(TRITON, "torch has none with weights' scales by row; measured 304"),
    ("experts", "int8"): Choice(TRITON, "torch has none; measured 414"),
    ("experts", "int4"): Choice(TRITON, "torch has none; measured 252"),
    ("linear", "nvfp4"): Choice(TRITON, "torch's product wants inputs in 4 bits too; not yet measured"),
    ("experts", "nvfp4"): Choice(TRITON, "torch has none for weights alone; not yet measured"),
    ("vocabulary", "float"): Choice(TRITON, "keeps scores out of memory; measured 1,967, torch 8,374"),
    ("vocabulary", "fp8"): Choice(TRITON, "keeps scores out of memory; measured 2,275"),
    ("vocabulary", "int8"): Choice(TRITON, "keeps scores out of memory; measured 2,435"),
}
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # matrices of a module that become one
MANY_ROWS = 512  # from which a weight of whole numbers is made floats for the library's product; not yet measured


@functools.cache
def available() -> bool:
    """Whether Triton is installed, and a card or its interpreter (`TRITON_INTERPRET=1`) is there to run it."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def choose(operation: str, weight: Weight | None = None) -> Choice:
    """What runs an operation with a weight."""
    form = form_of(weight)
    if not available():
        return Choice(PLAIN, "there is no Triton, or nothing to run it on")
    if weight is not None and not _fits(weight, operation):
        return Choice(PLAIN, "the kernels have no product for groups of this size")
    if form == "fp8" and _capability() < FP8_CAPABILITY:
        return Choice(PLAIN, "products in FP8 need compute capability 8.9")
    return _way(operation, form, () if weight is None else weight.shape)


def _way(operation: str, form: str, shape: Sequence[int]) -> Choice:
    """Of weights that the kernels have a product for."""
    if (operation, form) == ("linear", "fp8") and (any(size % 16 for size in shape) or not _scaled_products()):
        return Choice(TRITON, "torch._scaled_mm by row needs CUDA, compute capability 9.0, and sizes that 16 divides")
    return CHOICES.get((operation, form), Choice(PLAIN, "there is no kernel for weights of this form"))


def missing(network: torch.nn.Module) -> str | None:
    """Why the kernels cannot run a whole network; None if they can."""
    if not available():
        return "there is no Triton, or nothing to run it on"
    if _capability() < LEAST_CAPABILITY:
        major, minor = _capability()
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the kernels need 8.0"
    for path, module in network.named_modules():
        for name, weight in {**module._parameters, **vars(module)}.items():
            if not isinstance(weight, Tensor | Quantized | Packed) or len(weight.shape) < 2:
                continue
            operation = "vocabulary" if "embed" in path else "experts" if len(weight.shape) == 3 else "linear"
            if isinstance(weight, Packed) or choose(operation, weight).way == PLAIN:
                return f"no kernel takes {path}.{name} as it is held"
        for names in MERGED:
            forms = {_held(getattr(module, name)) for name in names if isinstance(getattr(module, name, None), Linear)}
            if len(forms) > 1:
                return f"{path}: {', '.join(names)} are not held alike, and the kernels take them as one"
    return None


def _held(module: Linear) -> tuple[str, int | None]:
    weight = module.weight
    return form_of(weight), getattr(weight, "group", None)


def form_of(weight: Weight | None) -> str:
    """ "float", or that of `Quantized`."""
    return weight.form if isinstance(weight, Quantized) else "float"


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] -> [..., O] in x's dtype. FP8 weights meet x in FP8, rounded row by row."""
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat) or choose("linear", weight).way == PLAIN:
        out = plain.linear(flat, weight)
    else:
        from .triton.common import operand
        from .triton.linear import ready

        own = operand(weight)
        out = product(ready(flat, own), own, x.dtype)
    return out.view(*x.shape[:-1], weight.shape[-2])


def product(own: Ready, weight: Operand, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T` of activations that are ready for the weight: [T, I] and [O, I] -> [T, O] in the dtype."""
    from .triton import linear as kernels

    if weight.form in ("int4", "nvfp4", "int8") and len(own.values) >= MANY_ROWS:
        return plain.linear(own.values, kernels.widened(weight, own.values.dtype))
    rounded = weight.form == "fp8" and dtype == torch.float32  # the library's outputs are in bfloat16
    if rounded or _way("linear", weight.form, weight.shape).way == TRITON:
        return kernels.product(own, weight, dtype)
    if weight.form == "float":
        return plain.linear(own.values, weight.data)
    out = torch._scaled_mm(
        own.values, weight.data.mT, scale_a=own.scales, scale_b=weight.scales.mT, out_dtype=torch.bfloat16
    )
    return out.to(dtype)


def experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Sum over each token's k experts of weight times `down(gelu(gate(x)) * up(x))`, in the router's order.

    Args:
        x: [T, H].
        weights: [T, k] float32.
        experts: [T, k] int64, below E.
        gate_up: [E, 2I, H], gate rows first.
        down: [E, H, I]; both weights in FP8, or neither.

    Returns:
        [T, H] in x's dtype.
    """
    ways = {choose("experts", gate_up).way, choose("experts", down).way}
    if ways != {TRITON} or (form_of(gate_up) == "fp8") != (form_of(down) == "fp8"):
        return plain.experts(x, weights, experts, gate_up, down)
    from .triton.experts import expert_outputs, weighted_sum

    order, offsets = plain.group(experts, gate_up.shape[0])
    return weighted_sum(expert_outputs(x, order, offsets, gate_up, down), weights)


def vocabulary(
    hidden: Tensor,
    table: Weight,
    wish: Wish,
    *,
    uniform: Tensor | None = None,
    hint: Tensor | None = None,
    soft: bool = True,
    product: Callable[[Tensor, Tensor], Tensor] = plain.linear,
) -> Look:
    """The vocabulary step: hidden states [n, H] and a table [V, H] -> what is found, and the table's rows blended by
    their probabilities, float32 [n, H] (None unless `soft`).

    Args:
        hidden: its dtype's tolerance is what a blend may leave out, as in `cpu.vocabulary`.
        uniform: [n] in [0, 1), to sample with; None: the likeliest.
        hint: changes nothing here.
        product: of activations and a table, where no kernel does it.
    """
    del hint
    if choose("vocabulary", table).way != TRITON:
        entries = table.float() if isinstance(table, Tensor) else table.dequantize()
        found, weights, totals = reference.read(product(hidden.float(), entries), wish, uniform)
        return Look(found, (weights / totals) @ entries if soft else None, 1.0 if soft else 0.0)
    from .triton import vocabulary as kernels

    device, n = hidden.device, len(hidden)
    bias = None
    if wish.bias:
        words, values = zip(*wish.bias, strict=True)
        bias = torch.tensor(words, device=device), torch.tensor(values, dtype=torch.float32, device=device)
    step = kernels.step(
        hidden, table, heats=torch.full((n,), wish.heat, device=device), cap=wish.cap,
        tolerance=TOLERANCE[hidden.dtype], uniform=uniform,
        barred=(torch.arange(n, device=device) < wish.barred).to(torch.int8),
        ends=torch.tensor(wish.ends, dtype=torch.int64, device=device), bias=bias, soft=soft,
    )  # fmt: skip
    return Look(step.found, step.soft, float(step.share))


def _fits(weight: Weight, operation: str) -> bool:
    from .triton.common import fits

    by_row = not isinstance(weight, Quantized) or weight.group is None
    return fits(weight) and (operation != "vocabulary" or by_row)


def _capability() -> tuple[int, int]:
    """The card's compute capability; of the interpreter and of AMD's cards, which count otherwise, any."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ANY_CAPABILITY
    return torch.cuda.get_device_capability()


def _scaled_products() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None and _capability() >= (9, 0)
