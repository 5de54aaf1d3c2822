"""Layouts on disk: bytes, what is recognised, and what is refused in one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dgemma.errors import CheckpointError, ConfigError
from dgemma.quant import Policy, kind_of, quantize, to_fp8
from dgemma.quant.codec import decode, encode
from dgemma.quant.layouts import Layout, recognise, written
from dgemma.quant.scheme import Scheme, write

O, I = 6, 64  # noqa: E741 - a matrix's rows and width
CODES = {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
         torch.bfloat16: "BF16", torch.float32: "F32"}  # fmt: skip


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {part: (CODES[tensor.dtype], tuple(tensor.shape)) for part, tensor in tensors.items()}


@pytest.mark.parametrize("width", [64, 40, 36, 34])
@pytest.mark.parametrize(("choice", "kind"), [("int4", "mlp"), ("int8", "mlp"), ("int8", "embedding"), ("fp8", "mlp")])
@pytest.mark.parametrize("grouped", [False, True])
def test_round_trip(choice: str, kind: str, width: int, grouped: bool) -> None:
    """What is announced is what is written, is recognised as what it is, and comes back bit for bit."""
    group = width // 2 if grouped and choice == "int4" else None
    weight = torch.randn(O, width, generator=torch.Generator().manual_seed(0))
    layout = written(choice, kind, group)
    matrix = to_fp8(weight) if choice == "fp8" else quantize(weight, bits=layout.bits, group=group)
    tensors = encode(layout, matrix)
    assert headers(tensors) == layout.headers((O, width))
    found = recognise(headers(tensors), (O, width))
    assert found == layout
    back = decode(found, tensors, (O, width))
    assert torch.equal(back.dequantize(), matrix.dequantize())
    assert layout.memory((O, width)) == back.nbytes == matrix.nbytes


def test_the_packed_bytes() -> None:
    """Eight values a word, value + 8, the first in the lowest bits."""
    values = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]]).float()
    tensors = encode(written("int4", "mlp", None), quantize(values, bits=4, group=None))
    word = sum((int(value) + 8) << 4 * place for place, value in enumerate(values[0]))
    assert tensors["weight_packed"].tolist() == [[word - (1 << 32)]]
    assert tensors["weight_scale"].tolist() == [[1.0]] and tensors["weight_shape"].tolist() == [1, 8]


def test_nvfp4_by_hand() -> None:
    """Codes, low nibble first; scale times code over the global scale (ModelOpt: times the second scale)."""
    codes = list(range(16))
    packed = torch.tensor([[codes[i] | codes[i + 1] << 4 for i in range(0, 16, 2)]], dtype=torch.uint8)
    wanted = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    scale = torch.tensor([[1.75]]).to(torch.float8_e4m3fn)
    theirs = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": torch.tensor([8.0])}
    layout = recognise(headers(theirs), (1, 16))
    assert decode(layout, theirs, (1, 16)).dequantize()[0].tolist() == [1.75 * value / 8 for value in wanted]
    nvidia = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.125)}
    layout = recognise(headers(nvidia), (1, 16))
    assert layout.name == "modelopt-nvfp4"
    held = decode(layout, nvidia, (1, 16))
    assert held.dequantize()[0].tolist() == [1.75 * value / 8 for value in wanted]
    assert held.form == "nvfp4" and held.values()[0].tolist() == [2 * value for value in wanted]
    assert layout.memory((1, 16)) == held.nbytes == 8 + 1 + 4
    zero = nvidia | {"weight_scale_2": torch.tensor(float("inf"))}
    with pytest.raises(CheckpointError, match="weight_scale holds NaN or infinity"):
        decode(layout, zero, (1, 16))


def good() -> dict[str, Any]:
    """Headers of a packed matrix in groups of 32."""
    return {"weight_packed": ("I32", (O, I // 8)), "weight_scale": ("BF16", (O, 2)), "weight_shape": ("I64", (2,))}


REFUSED = {
    "no scale": ({"weight_scale": None}, "weight_scale is missing"),
    "no shape": ({"weight_shape": None}, "weight_shape is missing"),
    "a scale alone": ({"weight_packed": None, "weight_shape": None}, "no weight_packed or weight"),
    "too many": ({"weight_global_scale": ("F32", (1,))}, "weight_global_scale is unexpected"),
    "3 bits": ({"weight_packed": ("I32", (O, 6))}, "weight_packed has shape [6, 6]"),
    "other rows": ({"weight_packed": ("I32", (O + 1, I // 8))}, "weight_packed has shape [7, 8]"),
    "other groups": ({"weight_scale": ("BF16", (O, 3))}, "weight_scale has shape [6, 3]"),
    "other scales": ({"weight_scale": ("BF16", (O - 1, 2))}, "weight_scale has shape [5, 2]"),
    "whole scales": ({"weight_scale": ("I32", (O, 2))}, "weight_scale is of type I32"),
    "mxfp4": (
        {"weight_packed": ("U8", (O, I // 2)), "weight_scale": ("U8", (O, 2)), "weight_shape": None},
        "weight_packed is of type U8, with a layout not read",
    ),
    "zero points of another shape": ({"weight_zero_point": ("I32", (O, 2))}, "weight_zero_point is I32 [6, 2]"),
    "zero points in 8 bits": (
        {"weight_packed": ("I32", (O, I // 4)), "weight_zero_point": ("I32", (1, 2))}, "weight_zero_point is not",
    ),
    "int8 of another shape": (
        {"weight_packed": None, "weight_shape": None, "weight": ("I8", (O, I + 1)), "weight_scale": ("F32", (O, 1))},
        "weight is I8 [6, 65]",
    ),
    "fp8 in blocks": (
        {"weight_packed": None, "weight_shape": None, "weight": ("F8_E4M3", (O, I)), "weight_scale": ("F32", (1, 2))},
        "weight_scale has shape [1, 2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused(case: str) -> None:
    change, said = REFUSED[case]
    parts = {part: header for part, header in (good() | change).items() if header is not None}
    with pytest.raises(CheckpointError) as caught:
        recognise(parts, (O, I))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_content_that_makes_no_sense() -> None:
    layout = written("int4", "mlp", 32)
    tensors = encode(layout, quantize(torch.randn(O, I), bits=4, group=32))
    with pytest.raises(CheckpointError, match=r"weight_shape says \[5, 64\]"):
        decode(layout, tensors | {"weight_shape": torch.tensor([5, 64])}, (O, I))
    tensors["weight_scale"][2, 1] = float("nan")
    with pytest.raises(CheckpointError, match="weight_scale holds NaN"):
        decode(layout, tensors, (O, I))
    broken = encode(written("fp8", "mlp", None), to_fp8(torch.randn(O, I)))
    broken["weight"].view(torch.uint8)[0, 0] = 0x7F
    with pytest.raises(CheckpointError, match="weight holds NaN"):
        decode(written("fp8", "mlp", None), broken, (O, I))


SECTION = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}}  # fmt: skip
BAD_SECTIONS: dict[str, tuple[Any, str]] = {
    "no object": ([], "holds no JSON object"),
    "another method": ({"quant_method": "gptq"}, "'gptq' is not read"),
    "no method": ({}, "quant_method"),
    "another format": (SECTION | {"format": "marlin-24"}, "'marlin-24' is not read"),
    "a group's other format": (
        SECTION | {"config_groups": {"a": {"format": "mxfp4-pack-quantized", "weights": {"num_bits": 4}}}}, "mxfp4",
    ),
    "no groups": (SECTION | {"config_groups": {}}, "config_groups: missing"),
    "no bits": (SECTION | {"config_groups": {"group_0": {}}}, "group_0.weights.num_bits: missing"),
    "rotated": (SECTION | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "sparse": (SECTION | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "not compressed": (SECTION | {"quantization_status": "calibration"}, "quantization_status"),
    "modelopt's other algorithms": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_SECTIONS))
def test_sections_that_are_refused(case: str) -> None:
    section, said = BAD_SECTIONS[case]
    with pytest.raises(ConfigError) as caught:
        Scheme.read({"quantization_config": section})
    assert said in str(caught.value) and str(caught.value).startswith("quantization_config")


def test_sections_that_are_read() -> None:
    assert Scheme.read({}) is None
    scheme = Scheme.read({"quantization_config": SECTION | {"sparsity_config": {}, "transform_config": {}}})
    assert scheme is not None and scheme.bits == {("int", 4)}
    scheme.check(Layout(name="pack-quantized", stored_bits=4, bits=4, group=32))
    with pytest.raises(ConfigError, match="says int4, the weights are float8"):
        scheme.check(Layout(name="float-quantized", stored_bits=8, bits=8, group=None))
    # Our own, for every policy.
    for form in ("int4", "int8", "fp8"):
        layouts = {kind: written(form, kind, 32) for kind in ("experts", "mlp")}
        layouts["embedding"] = written("int8", "embedding", None)
        read = Scheme.read({"quantization_config": write(layouts)})
        assert read is not None
        for layout in layouts.values():
            read.check(layout)


def test_kinds() -> None:
    """Every matrix has its kind, and nothing else has one."""
    kinds = {
        "layers.0.experts.gate_up_proj": "experts",
        "layers.12.experts.down_proj": "experts",
        "layers.0.self_attn.k_proj.weight": "attention",
        "layers.0.mlp.down_proj.weight": "mlp",
        "embed_tokens.weight": "embedding",
        "self_conditioning.up_proj.weight": "conditioning",
        "layers.3.router.proj.weight": "router",
        "layers.3.router.scale": None,
        "layers.3.self_attn.q_norm.weight": None,
        "self_conditioning.pre_norm.weight": None,
        "layers.0.encode_scalar": None,
        "norm.weight": None,
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_policies() -> None:
    kinds = ("experts", "embedding", "router", "conditioning", None)
    assert [Policy(format="int4").choice(kind) for kind in kinds] == ["int4", "int8", "keep", "keep", "keep"]
    assert Policy(format="fp8").choice("embedding") == "keep"
    assert Policy(format="int8", kinds={"router": "int8", "mlp": "keep"}).choice("mlp") == "keep"
    widths = {"a": 704, "b": 2112, "c": 2816}
    assert Policy(format="int4").group_for(widths) == 64
    assert Policy(format="int4").group_for(widths | {"d": 96}) == 32
    assert Policy(format="int4", group="row").group_for(widths | {"d": 10}) is None
    assert Policy(format="int4", group=16).group_for({"d": 48}) == 16
    bad: list[tuple[dict[str, Any], str]] = [
        ({"format": "int3"}, "format: 'int3'"),
        ({"format": "int4", "group": 48}, "group: 48"),
        ({"format": "int8", "group": 64}, "group: only int4"),
        ({"format": "int4", "kinds": {"norms": "int8"}}, "kind: 'norms' is unknown"),
        ({"format": "int4", "kinds": {"mlp": "int3"}}, "kind: mlp=int3"),
        ({"format": "int8", "kinds": {"embedding": "fp8"}}, "kind: embedding=fp8"),
        ({"format": "fp8", "kinds": dict.fromkeys(("experts", "attention", "mlp"), "keep")}, "everything is kept"),
    ]
    for fields, said in bad:
        with pytest.raises(ConfigError, match=said):
            Policy(**fields)
    with pytest.raises(ConfigError, match="x is 40 wide, no multiple of 32"):
        Policy(format="int4").group_for({"x": 40})
    with pytest.raises(ConfigError, match="x is 41 wide, 4-bit values"):
        Policy(format="int4", group="row").group_for({"x": 41})
