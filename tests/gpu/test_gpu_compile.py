"""Triton compiles for Hopper without a card: what the interpreter runs is also what the compiler takes.

Compiling is done in a process of its own, without the interpreter. The largest tiles are taken, where registers and
shared memory are shortest.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from collections import defaultdict
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dgemma.kernels.triton import attention, draws, experts, layer, linear, routing, tiles, vocabulary

KINDS = {
    "fp32": "xs peaks sums totals means factors parts scales out_scales heats biases uniforms scalars expert_scale",
    "i64": "ends bias_words argmaxes samples slots", "i8": "barred",
    "i32": "order offsets segments blocks pages ranks counts ticket live taken words",
}
KIND = {name: "*" + kind for kind, names in KINDS.items() for name in names.split()}
KIND |= dict.fromkeys("T N K E H D V n k count window most heads kv_heads rows_in_all bias_count end_count "
                      "tile_count".split(), "i32") | dict.fromkeys("eps factor cap least".split(), "fp32")

def build(kernel, tile, constants, **kinds):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, KIND.get(n, "*bf16")) for n in names}
    wide = [(i,) for i, n in enumerate(names) if signature[n].startswith("*") or n in "KNHDV"]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants,
                       attrs={place: [["tt.divisibility", 16]] for place in wide})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024, made.metadata.shared
    return made.asm["ptx"]

WEIGHTS = {"float": {}, "int8": {"w": "*i8", "ws": "*fp32"}, "int4": {"w": "*u8", "ws": "*fp32"},
           "fp8": {"x": "*fp8e4nv", "w": "*fp8e4nv", "ws": "*fp32"}}

def products(form):
    group, kinds = 64 if form == "int4" else 0, WEIGHTS[form]
    for rows in (16, 256):
        t = tiles.product(rows, form, group, 4096)
        sizes = {"FORM": form, "GROUP": group, "BM": t.rows, "BN": t.columns, "BK": t.inner}
        assert "wgmma" in build(linear._linear_kernel, t, sizes, **kinds)
        down = {**sizes, "BK": 64} if form == "fp8" else sizes
        build(experts._down_kernel, t, {**down, "SPAN": 64 if form == "fp8" else 0, "PADDED": 128}, **kinds)
        t = tiles.product(rows, form, group, 64)
        sizes |= {"BM": t.rows, "BN": t.columns, "HALVES": group, "PADDED": 128}
        build(experts._gate_up_kernel, t, sizes, **kinds, out="*fp8e4nv" if form == "fp8" else "*bf16")

def attending(form):
    for width, group in ((512, 8), (256, 2)):
        t = tiles.attention(width)
        sizes = {"GROUP": group, "LANES": group, "BQ": t.rows // group, "BK": t.columns, "BD": width, "PAGE": 256}
        assert "wgmma" in build(attention._attend_kernel, t, {**sizes, "SPLITS": 4}, out="*fp32")
        build(attention._merge_kernel, tiles.Tile(rows=1, columns=1), {"SPLITS": 4, "PADDED": 4, "BD": width})

def words(form):
    t, b, kinds = tiles.vocabulary(256), tiles.blend(256), WEIGHTS[form]
    sizes = {"BM": t.rows, "BN": t.columns}
    assert "wgmma" in build(vocabulary._scores_kernel, t, {**sizes, "FORM": form, "CAPPED": True, "BK": t.inner},
                            **kinds)
    build(vocabulary._merge_kernel, t, {"SAMPLED": True, "PADDED": 2048, "BN": t.columns}, words="*i32")
    build(vocabulary._live_kernel, t, {"BM": b.rows, "PADDED": 2048})
    assert "wgmma" in build(vocabulary._blend_kernel, b, {**sizes, "SCALED": form != "float", "SPLITS": 6,
                                                          "BH": b.inner}, **{**kinds, "x": "*bf16"})

def rest(form):
    t = tiles.Tile(rows=1, columns=1, warps=8)
    build(routing._route_kernel, t, {"BT": 16, "PADDED": 128, "PROGRAMS": 16, "SPOTS": 1024},
          weights="*fp32", experts="*i64")
    for half, kv in ((256, 2), (128, 8)):
        build(layer._heads_kernel, t, {"PAGE": 256, "HALF": half, "HEADS": 16, "KV_HEADS": kv})
    build(layer._gate_kernel, t, {"BLOCK": 1024})
    build(draws._draws_kernel, t, {"WIDTH": 256}, seeds="*i64", canvases="*i64", steps="*i64", noise="*i64",
          words="i32", length="i32")
    build(layer._enter_kernel, t, {"ADD": True, "COUNT": 3, "WIDTH": 4096})
    build(layer._leave_kernel, t, {"NEXT": True, "WIDTH": 4096}, weights="*fp32")
    build(experts._sum_kernel, t, {"BN": 1024}, weights="*fp32")
    build(linear._fp8_kernel, t, {"WIDTH": 4096}, out="*fp8e4nv")

globals()[sys.argv[1]](sys.argv[2])
"""


@pytest.mark.parametrize(
    ("part", "form"),
    [("products", f) for f in ("float", "fp8", "int8", "int4")]
    + [("attending", ""), ("rest", "")]
    + [("words", f) for f in ("float", "fp8")],
)
def test_compiles_for_hopper(part: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, within a multiprocessor's shared memory; products on its tensor cores."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    done = subprocess.run([sys.executable, "-c", CODE, part, form], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
