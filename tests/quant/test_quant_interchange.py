"""Others' files load here, ours load elsewhere: with the compressed-tensors package as the other side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits import Formats, distance, look, package_copy, tensors_of, unfused, weights_on_disk
from packed_copies import left_in, same
from safetensors.torch import save_file

from dgemma.checkpoint import summarize
from dgemma.checkpoint.inventory import take_inventory


def args(**fields: Any) -> Any:
    """The package's settings of one tensor."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**fields)


def token(kind: str) -> Any:
    """Inputs in 8 bits, rounded token by token."""
    return args(num_bits=8, type=kind, strategy="token", dynamic=True, symmetric=True)


def int_args(bits: int, group: int | None, symmetric: bool = True) -> Any:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return args(num_bits=bits, type="int", symmetric=symmetric, **strategy)


SCHEMES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "int4 groups of 32": (lambda: {"weights": int_args(4, 32)}, "pack-quantized"),
    "int4 groups of 16": (lambda: {"weights": int_args(4, 16)}, "pack-quantized"),
    "int4 by rows": (lambda: {"weights": int_args(4, None)}, "pack-quantized"),
    "int4 with zero points": (lambda: {"weights": int_args(4, 32, symmetric=False)}, "pack-quantized"),
    "int4 by rows with zero points": (lambda: {"weights": int_args(4, None, symmetric=False)}, "pack-quantized"),
    "int8 packed": (lambda: {"weights": int_args(8, 32)}, "pack-quantized"),
    "int8 by rows": (
        lambda: {"weights": int_args(8, None), "input_activations": token("int")}, "int-quantized",
    ),
    "fp8 by rows": (
        lambda: {"weights": args(num_bits=8, type="float", strategy="channel"), "input_activations": token("float")},
        "float-quantized",
    ),
    "fp8, one scale": (
        lambda: {"weights": args(num_bits=8, type="float", strategy="tensor"), "input_activations": token("float")},
        "float-quantized",
    ),
    "nvfp4": (
        lambda: {
            "weights": args(
                num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
            )
        },
        "nvfp4-pack-quantized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SCHEMES))
def test_files_of_the_package_load_here(name: str, source: Path, tmp_path: Path, load: Any, cache: Path) -> None:
    """Weight for weight what the package makes of them itself, and the network runs on them."""
    make, fmt = SCHEMES[name]
    wanted = package_copy(source, tmp_path / "copy", make(), fmt)
    assert len(wanted) > 20
    found = weights_on_disk(load(tmp_path / "copy", dequantize=True))
    for module, weight in wanted.items():
        # The package multiplies value and scale in float32 in another order where there are two scales.
        assert torch.allclose(found[module], weight, rtol=2e-7 if fmt.startswith("nvfp4") else 0, atol=0), module
    network = load(tmp_path / "copy")
    assert len(network.quantized()) == 17
    load(tmp_path / "copy", keep_packed=True)
    assert len(left_in(cache)) == 1 and same(load(tmp_path / "copy"), network)
    if name == "nvfp4":  # in 4 bits, and nothing is lost by that
        held, exact = network.quantized(), load(tmp_path / "copy", dequantize=True).state_dict()
        assert all(own.bits == 4 and torch.equal(own.dequantize(), exact[path]) for path, own in held.items())
        counted = take_inventory(tmp_path / "copy", network.config, {k: tuple(t.shape) for k, t in exact.items()})
        sizes = {path: own.nbytes for path, own in held.items()}
        assert sizes == {path: counted.weights[path].memory(4) for path in held}
        summary = summarize(tmp_path / "copy")
        rest = sum(tensor.numel() * 2 for path, tensor in exact.items() if path not in held)
        assert summary.memory[0].weights == pytest.approx(sum(sizes.values()) + rest, rel=0.001)
    # Activations are rounded to 8 bits, product after product, and this network's logits are sharp.
    assert distance(look(network), look(load(tmp_path / "copy", dequantize=True))) < 0.08


def test_modelopts_layout(source: Path, tmp_path: Path, load: Any) -> None:
    """The same NVFP4 weights under ModelOpt's names: scales that multiply, inputs' scales beside them."""
    make, fmt = SCHEMES["nvfp4"]
    package_copy(source, tmp_path / "copy", make(), fmt)
    wanted = weights_on_disk(load(tmp_path / "copy", dequantize=True))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(tmp_path / "copy").items():
        stem, _, last = name.rpartition(".")
        if last == "weight_packed":
            tensors |= {f"{stem}.weight": tensor, f"{stem}.input_scale": torch.tensor(0.25)}
        elif last == "weight_global_scale":
            tensors[f"{stem}.weight_scale_2"] = 1 / tensor[0]
        else:
            tensors[name] = tensor
    tensors["model.decoder.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    data = json.loads((tmp_path / "copy" / "config.json").read_text())
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(data | {"quantization_config": section}))
    found = weights_on_disk(load(tmp_path / "copy", dequantize=True))
    assert all(torch.allclose(found[name], wanted[name], rtol=3e-7, atol=0) for name in wanted)
    # Older exports say it in a file of its own.
    del data["quantization_config"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(data))
    old = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "copy" / "hf_quant_config.json").write_text(json.dumps(old))
    again = weights_on_disk(load(tmp_path / "copy", dequantize=True))
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_our_files_load_in_the_package(form: str, copies: Formats, tmp_path: Path, load: Any) -> None:
    """Its own tool makes a float checkpoint of ours, by our `quantization_config`, with the weights that we see."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    ours = copies(form)
    tool = CompressedTensorsDequantizer(ours, dtype=torch.float32)
    convert_checkpoint(ours, tmp_path / "back", tool, max_workers=1, device="cpu")
    wanted = weights_on_disk(load(ours, dequantize=True))
    found = tensors_of(tmp_path / "back")
    for name, weight in wanted.items():
        # It multiplies in the scales' own type, bfloat16.
        assert torch.allclose(found[name].float(), weight, rtol=2**-8, atol=0), name
    # ... and that one loads here, experts one by one as they are in it.
    assert distance(look(load(tmp_path / "back")), look(load(ours, dequantize=True))) < 0.1


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_our_section_means_the_same_to_the_package(form: str, copies: Formats) -> None:
    """Each module of the file falls into the group whose settings its tensors have; kept ones into none."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    section = json.loads((copies(form) / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    assert config.quant_method == "compressed-tensors" and config.quantization_status == "compressed"
    tensors = tensors_of(copies(form))
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    assert len(modules) == 4 * 2 + 3 * 2 + 2 * 4 * 3 - 1 + (form != "fp8")
    linear = {name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")} | modules
    for module in linear:
        ignored = any(match_name(module, target) for target in config.ignore)
        assert ignored == (module not in modules), module
        if ignored:
            continue
        groups = list(config.config_groups.values())
        scheme = next((g for g in groups if any(match_name(module, t) for t in g.targets)), groups[-1])
        assert "embed_tokens" in module or scheme.targets == ["Linear"]
        packed = tensors.get(f"{module}.weight_packed", tensors.get(f"{module}.weight"))
        rows, width = (
            tensors[f"{module}.weight_shape"].tolist() if f"{module}.weight_shape" in tensors else packed.shape
        )
        scales = tensors[f"{module}.weight_scale"]
        assert packed.shape[-1] * packed.itemsize * 8 == width * scheme.weights.num_bits
        assert scales.shape == (rows, width // scheme.weights.group_size if scheme.weights.group_size else 1)
        assert packed.dtype == {"pack-quantized": torch.int32}.get(scheme.format, scheme.weights.pytorch_dtype())


def test_nothing_else_changes(source: Path, copies: Formats) -> None:
    """Norms, scalars, router, self-conditioning, images: bit for bit; every other file too."""
    before, after = unfused(tensors_of(source)), tensors_of(copies("int4"))
    kept = [name for name in before if name in after]
    assert len(kept) > 40 and all(torch.equal(before[name], after[name]) for name in kept)
    gone = {name for name in before if name not in after}
    assert {name.removesuffix("weight") + "weight_packed" for name in gone} <= after.keys()
    assert (copies("int4") / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    told = [json.loads((path / "config.json").read_text()) for path in (source, copies("int4"))]
    assert told[1].pop("quantization_config") and told[0] == told[1]
