"""The instructions that unpack 4 bits on a card, which the interpreter leaves out: run here one by one, bit for bit."""

from __future__ import annotations

import re

import pytest
import torch

from dgemma.kernels.triton.common import E2M1, INT4, LESS
from dgemma.quant import Quantized

MASK = 0xFFFFFFFF


def bfloat16(bits: int) -> float:
    """The number that 16 bits stand for."""
    return float(torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(torch.bfloat16))


def bits_of(value: float) -> int:
    """A number's 16 bits, rounded once; the tests' own products have few enough to be whole in float64."""
    return int(torch.tensor([value], dtype=torch.float64).to(torch.bfloat16).view(torch.int16)) & 0xFFFF


def lut(a: int, b: int, c: int, table: int) -> int:
    """`lop3`: of each place's three bits, what the table says."""
    found = 0
    for place in range(32):
        index = (a >> place & 1) << 2 | (b >> place & 1) << 1 | (c >> place & 1)
        found |= (table >> index & 1) << place
    return found


def run(code: str, word: int, scale: int) -> list[int]:
    """The four outputs of an assembler text with two packed words, $4, and two packed scales, $5."""
    held = {"$4": word, "$5": scale}
    for line in re.findall(r"^([a-z].*);$", code, re.M):
        name, _, rest = line.partition(" ")
        target, *own = (part.strip() for part in rest.split(","))
        given = [held[part] if part in held else int(part, 0) for part in own]
        if name == "mov.b32":
            held[target] = given[0]
        elif name == "shl.b32":
            held[target] = given[0] << given[1] & MASK
        elif name == "shr.u32":
            held[target] = given[0] >> given[1]
        elif name == "and.b32":
            held[target] = given[0] & given[1]
        elif name == "lop3.b32":
            held[target] = lut(*given)
        else:
            assert name == "fma.rn.bf16x2", line
            a, b, c = ([bfloat16(x & 0xFFFF), bfloat16(x >> 16)] for x in given)
            held[target] = bits_of(a[0] * b[0] + c[0]) | bits_of(a[1] * b[1] + c[1]) << 16
    return [held[f"${n}"] for n in range(4)]


def values(form: str, words: list[int]) -> list[list[int]]:
    """What `Quantized` makes of words of four values."""
    data = torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.uint8).repeat(1, 8)
    own = {"scales": torch.ones(1, 2), "factors": None}
    if form == "nvfp4":
        own = {"scales": torch.ones(1, 2).to(torch.float8_e4m3fn), "factors": torch.ones(1, 1)}
    return Quantized(bits=4, group=16, data=data[:, :16], **own).values()[0, :8].view(2, 4).tolist()


@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_every_code_with_any_scale(form: str) -> None:
    """All codes in all places; of NVFP4 with all scales, the subnormal and the largest among them, exactly."""
    finite = [byte for byte in range(256) if byte & 127 != 127]
    for turn in range(len(finite) if form == "nvfp4" else 16):
        words = [sum((turn + 5 * place + half) % 16 << 4 * place for place in range(4)) for half in (0, 3)]
        if form == "nvfp4":
            byte = torch.tensor([finite[turn]], dtype=torch.uint8)
            scale = float(byte.view(torch.float8_e4m3fn).float())
            given, code = bits_of(scale / LESS.value * 2.0**127), E2M1.value
            assert bfloat16(given) == scale / LESS.value * 2.0**127
            scale /= LESS.value
        else:
            given, scale, code = bits_of(1 / 64), 1 / 64, INT4.value
        found = run(code, words[0] | words[1] << 16, given | given << 16)
        for half, wanted in enumerate(values(form, words)):
            assert [bfloat16(out >> 16 * half & 0xFFFF) for out in found] == [value * scale for value in wanted]
