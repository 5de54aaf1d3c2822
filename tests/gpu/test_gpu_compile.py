"""Triton compiles without a card: what the interpreter runs is also what the compiler takes. For Hopper, and products
for the oldest cards too, since some have instructions of their own.

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
import torch
from dgemma.kernels.triton import attention, common, draws, experts, layer, linear, routing, settle, tiles, vocabulary

KINDS = {
    "fp32": "xs wf peaks sums totals means factors parts scales out_scales heats biases uniforms norms "
            "expert_scale table_scales frequencies entropies real kept",
    "i64": "ends bias_words argmaxes samples slots tokens spots canvases places positions whole pins likeliest seeds "
           "steps", "i8": "barred accepted", "u8": "flags",
    "i32": "order offsets segments blocks pages ranks counts ticket live taken words",
}
KIND = {name: "*" + kind for kind, names in KINDS.items() for name in names.split()}
KIND |= dict.fromkeys("T N K E H D V n k count window most heads kv_heads rows_in_all bias_count end_count "
                      "tile_count pitch turn_pitch encoded pairs L length first before".split(), "i32")
KIND |= dict.fromkeys("eps factor cap least scale".split(), "fp32")

def build(kernel, tile, constants, capability=90, **kinds):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, KIND.get(n, "*bf16")) for n in names}
    wide = [(i,) for i, n in enumerate(names) if signature[n].startswith("*") or n in "KNHDV"]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants,
                       attrs={place: [["tt.divisibility", 16]] for place in wide})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.metadata.shared <= 227 * 1024, made.metadata.shared
    return made.asm["ptx"]

WEIGHTS = {"float": {}, "int8": {"w": "*i8", "ws": "*fp32"}, "int4": {"w": "*i16", "ws": "*fp32"},
           "nvfp4": {"w": "*i16", "ws": "*i32"}, "fp8": {"x": "*fp8e4nv", "w": "*fp8e4nv", "ws": "*fp32"}}

def operand_of(form, *shape):
    data = torch.empty(0)
    return common.Operand(data, data, data, form, 64 if form in common.FOUR_BITS else 0, shape)

def products(form):
    kinds = WEIGHTS[form]
    for rows in (16, 256):
        own = operand_of(form, 4096, 2816)
        if form not in ("float", "fp8"):
            wide = {"FORM": form, "GROUP": own.group, "BN": 64, "BK": own.span or 128}
            build(linear._widen_kernel, tiles.Tile(rows=1, columns=1), wide, **kinds)
        t = tiles.product(rows, own, 4096)
        sizes = {"FORM": form, "GROUP": own.group, "BM": t.rows, "BN": t.columns, "BK": t.inner}
        assert "wgmma" in build(linear._linear_kernel, t, sizes, **kinds)
        first, second = operand_of(form, 128, 1408, 2816), operand_of(form, 128, 2816, 704)
        one, two = tiles.experts(rows, first, second)
        sizes |= {"BM": one.rows, "BN": one.columns, "BK": one.inner, "SPREAD": second.span, "PADDED": 128}
        build(experts._gate_up_kernel, one, sizes, **kinds, out="*fp8e4nv" if form == "fp8" else "*bf16")
        sizes |= {"BM": two.rows, "BN": two.columns, "BK": two.inner, "SPAN": 64 if form == "fp8" else 0}
        build(experts._down_kernel, two, {n: v for n, v in sizes.items() if n != "SPREAD"}, **kinds)

WRITTEN = {"float": "*bf16", "fp8": "*fp8e4nv", "int4": "*bf16"}  # "nvfp4" as "int4"

def written(form, more=""):
    return {"FORM" + more: form, "SPAN" + more: 128 if form == "int4" else 0}

def older(form):
    sizes = {"FORM": form, "GROUP": 64, "BM": 64, "BN": 64, "BK": 128}
    made = build(linear._linear_kernel, tiles.Tile(rows=64, columns=64, stages=2), sizes, 80, **WEIGHTS[form])
    assert "mma.sync" in made

def attending(form):
    for width, group in ((512, 8), (256, 2)):
        t = tiles.attention(width)
        sizes = {"GROUP": group, "LANES": group, "BQ": t.rows // group, "BK": t.columns, "BD": width, "PAGE": 256}
        assert "wgmma" in build(attention._attend_kernel, t, {**sizes, "SPLITS": 4})
        for form in ("float", "fp8", "int4"):
            build(attention._merge_kernel, tiles.Tile(rows=1, columns=1, warps=8), {"SPLITS": 4, "WIDTH": 16 * width}
                  | written(form), parts="*bf16", tokens="i32", out=WRITTEN[form])

def words(form):
    t, b, kinds = tiles.vocabulary(256, form), tiles.blend(256), WEIGHTS[form]
    sizes = {"BM": t.rows, "BN": t.columns}
    own = {"FORM": form, "CAPPED": True, "SHARED": True, "BK": t.inner}
    assert "wgmma" in build(vocabulary._scores_kernel, t, {**sizes, **own}, **kinds)
    own = {"SAMPLED": True, "SHARED": True, "PADDED": 2048, "SCALED": form != "float", "BN": t.columns}
    build(vocabulary._merge_kernel, t, own, words="*i32", ws="*fp32")
    build(vocabulary._live_kernel, t, {"BM": b.rows, "STEP": 16, "PADDED": 2048})
    own = {"SHARED": True, "SPLITS": 6, "BM": b.rows, "BN": t.columns, "BH": b.columns, "BK": b.inner}
    assert "wgmma" in build(vocabulary._blend_kernel, b, own, **{**kinds, "x": "*bf16"})

def rest(form):
    t = tiles.Tile(rows=1, columns=1, warps=8)
    build(routing._route_kernel, t, {"BT": 16, "PADDED": 128, "PROGRAMS": 16, "SPOTS": 1024},
          weights="*fp32", experts="*i64")
    for half, kv in ((256, 2), (128, 8)):
        build(layer._heads_kernel, t, {"PAGE": 256, "HALF": half, "HEADS": 16, "KV_HEADS": kv})
    for form in ("float", "fp8", "int4"):
        own, wide = WRITTEN[form], {"WIDTH": 4096}
        build(layer._gate_kernel, t, written(form) | wide, out=own)
        build(layer._norm_kernel, t, written(form) | wide | {"SCALED": True}, out=own)
        build(layer._enter_kernel, t, written(form, "_ONE") | written(form, "_TWO") | wide, out_one=own, out_two=own,
              scales_one="*fp32", scales_two="*fp32")
        build(layer._leave_kernel, t, written(form) | wide, weights="*fp32", normed=own)
        if form != "float":
            build(linear._ready_kernel, t, written(form) | wide, out=own)
        build(layer._embed_kernel, t, written(form) | wide | {"TABLE": "float"}, normed=own)
    for form in ("fp8", "int8"):
        build(layer._embed_kernel, t, written("fp8") | wide | {"TABLE": form}, normed="*fp8e4nv",
              table=WEIGHTS[form]["w"])
    build(layer._condition_kernel, t, wide)
    build(layer._turns_kernel, t, {"WIDTH": 512})
    build(layer._sound_kernel, t, wide)
    build(draws._uniform_kernel, t, {"PURPOSE": 1, "WIDTH": 256}, out="*fp64")
    columns = {"COLUMNS": 7 + settle.ENDS}
    build(settle._ask_kernel, t, columns | {"WIDTH": 256}, counts="*i64")
    own = {"ENDS": settle.ENDS, "OVER": settle.OVER, "BROKEN": settle.BROKEN, "WIDTH": 256, "BLOCK": 16}
    build(settle._settle_kernel, t, columns | own, counts="*i64", words="i32")
    build(settle._keep_kernel, t, {"SPLITS": 6, "WIDTH": 4096})
    build(experts._sum_kernel, t, {"BN": 1024}, weights="*fp32")

def wide(form):
    t = tiles.vocabulary(256, form, True)
    own = {"FORM": form, "CAPPED": True, "SHARED": False, "BM": t.rows, "BN": t.columns, "BK": t.inner}
    build(vocabulary._scores_kernel, t, own, x="*fp32", w="*fp32", weights="*fp32")
    t = tiles.attention(512, True)
    own = {"GROUP": 8, "LANES": 8, "BQ": t.rows // 8, "BK": t.columns, "BD": 512, "PAGE": 256, "SPLITS": 4}
    build(attention._attend_kernel, t, own,
          **dict.fromkeys("queries keys values pool_keys pool_values out".split(), "*fp32"))

globals()[sys.argv[1]](sys.argv[2])
"""


@pytest.mark.parametrize(
    ("part", "form"),
    [("products", f) for f in ("float", "fp8", "int8", "int4", "nvfp4")]
    + [("older", f) for f in ("float", "int8", "int4", "nvfp4")]
    + [("attending", ""), ("rest", "")]
    + [("words", f) for f in ("float", "fp8", "int8")]
    + [("wide", "float")],
)
def test_compiles(part: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, within a multiprocessor's shared memory; products on its tensor cores; "older": for the oldest
    cards that the kernels are for; "wide": in float32, which takes the most memory."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    done = subprocess.run([sys.executable, "-c", CODE, part, form], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
