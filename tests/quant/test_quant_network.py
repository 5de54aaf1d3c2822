"""Networks in few bits: near the float one, the same as their own weights made floating-point, strict about files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits import SPEC, Formats, distance, look, tensors_of
from safetensors.torch import save_file

import dgemma
from dgemma import SamplingParams
from dgemma.checkpoint import load as module
from dgemma.checkpoint import save_checkpoint, summarize
from dgemma.errors import CapacityError, CheckpointError, ConfigError, DGemmaError
from dgemma.kernels.cpu import pack, unpack
from dgemma.model.linear import combine, linear, lookup
from dgemma.params import GenerationConfig
from dgemma.quant import Quantized, quantize, to_fp8


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.1), ("fp8", 0.15), ("int4", 0.45)])
def test_near_the_float_network(form: str, bound: float, source: Path, copies: Formats, load: Any) -> None:
    """The relative distance of logits stays below a few times that of weights (0.6, 2.6 and 8 %) and activations in 8
    bits (0.8 %): this network's logits are sharp and it has but two layers, so an error is neither averaged away nor
    built up."""
    wanted, found = look(load(source)), look(load(copies(form)))
    assert 0 < distance(found, wanted) < bound


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_near_its_weights_made_floating_point(form: str, copies: Formats, load: Any) -> None:
    """What is left is the rounding of activations."""
    network = load(copies(form))
    assert len(network.quantized()) == 18
    assert not any(name in network.state_dict() for name in network.quantized())
    exact = load(copies(form), dequantize=True)
    for name, weight in network.quantized().items():
        assert torch.equal(weight.dequantize(), exact.get_parameter(name).float()), name
    assert distance(look(network), look(exact)) < 0.08


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_the_compiled_kernels_and_their_twins_give_the_same(
    form: str, copies: Formats, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through the whole network."""
    found = look(load(copies(form)))
    monkeypatch.setattr("dgemma.kernels.cpu.pack", lambda weight: weight)
    plain = load(copies(form))
    assert all(isinstance(weight, Quantized) for weight in plain.quantized().values())
    assert torch.equal(look(plain), found)


def test_fp8_is_int8_on_a_cpu(copies: Formats, load: Any) -> None:
    """Each row is rounded once more, to a 254th of its largest weight at most."""
    held, exact = load(copies("fp8")), load(copies("fp8"), dequantize=True).state_dict()
    for name, weight in held.quantized().items():
        assert weight.bits == 8 and not getattr(weight, "floating", False)
        off = (weight.dequantize() - exact[name]).abs().amax(dim=-1)
        assert bool((off <= exact[name].abs().amax(dim=-1) / 254 * 1.01).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [
    pytest.param(lambda w: quantize(w, bits=4, group=32), id="int4"),
    pytest.param(lambda w: quantize(w, bits=8, group=None), id="int8"),
    pytest.param(to_fp8, id="fp8"),
])  # fmt: skip
def test_products(weight: Callable[[torch.Tensor], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, with weights taken in tiles of any size."""
    generator = torch.Generator().manual_seed(0)
    matrix = weight(torch.randn(77, 96, generator=generator))
    x = torch.randn(2, 5, 96, generator=generator).to(dtype)
    y = torch.rand(2, 5, 77, generator=generator).to(dtype)
    exact = matrix.dequantize().double()
    near = {"rtol": 2**-7, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    # Activations in 8 bits, row by row, where weights are whole numbers.
    rounding = 0 if matrix.floating else x.double().abs().amax(dim=-1, keepdim=True) / 254 * exact.abs().sum(dim=-1)
    for tile in (96, 96 * 10, 1 << 21):
        monkeypatch.setattr("dgemma.model.linear.TILE", tile)
        assert linear(x, matrix).dtype == combine(y, matrix).dtype == dtype
        product = x.double() @ exact.T
        off = (linear(x, matrix).double() - product).abs()
        assert (off <= rounding + near["atol"] + near["rtol"] * product.abs()).all()
        assert torch.allclose(combine(y, matrix).double(), y.double() @ exact, **near)
    tokens = torch.tensor([[3, 0], [76, 3]])
    assert torch.equal(lookup(tokens, matrix, dtype), matrix.dequantize()[tokens].to(dtype))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_others(form: str, copies: Formats, load: Any) -> None:
    """Bit for bit, alone and among others: what the engine's repeatable answers rest on."""
    network = load(copies(form))
    x = torch.randn(37, SPEC.hidden, generator=torch.Generator().manual_seed(0))
    for name, weight in network.quantized().items():
        plain = weight if isinstance(weight, Quantized) else unpack(weight)
        matrix = pack(plain[0]) if len(plain.shape) == 3 else weight
        rows = x[:, : matrix.shape[-1]].contiguous() if matrix.shape[-1] <= SPEC.hidden else torch.cat([x, x], dim=1)
        rows = rows[:, : matrix.shape[-1]]
        together = linear(rows, matrix)
        assert all(torch.equal(linear(rows[i : i + 3], matrix), together[i : i + 3]) for i in (0, 17, 34)), name


def test_the_engine_runs_it(copies: Formats) -> None:
    """Alone and in a batch the same answers; the activations' type is the caller's."""
    model = dgemma.load(copies("int4"), device="cpu")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    params = [SamplingParams(seed=seed, max_new_tokens=12) for seed in (1, 2)]
    alone = [model.generate(prompt, each).tokens for prompt, each in zip(prompts, params, strict=True)]
    assert [result.tokens for result in model.map(zip(prompts, params, strict=True))] == alone
    half = dgemma.load(copies("int4"), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.generate(prompts[0], params[0]).tokens


def test_it_is_not_saved(copies: Formats, load: Any, tmp_path: Path) -> None:
    """Neither as half a model, nor, made floating-point, as one that says it is in few bits."""
    with pytest.raises(CheckpointError, match="few bits cannot be saved"):
        dgemma.load(copies("int8"), device="cpu").save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    network = load(copies("int8"), dequantize=True)
    save_checkpoint(network, network.config, tmp_path / "x", generation=GenerationConfig())
    assert "quantization_config" not in json.loads((tmp_path / "x" / "config.json").read_text())
    assert torch.equal(look(load(tmp_path / "x")), look(network))


@pytest.mark.parametrize("form", ["float32", "int4", "fp8"])
def test_memory_is_counted_beforehand(
    form: str, source: Path, copies: Formats, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is refused before a byte is read; the count is that of the loaded network."""
    directory = source if form == "float32" else copies(form)
    network = load(directory, dtype=torch.bfloat16)
    held = sum(weight.nbytes for weight in network.quantized().values())
    held += sum(tensor.nbytes for tensor in network.state_dict().values())
    if form != "float32":
        summary = summarize(directory)
        assert summary.memory[0].name == "as stored" and summary.memory[0].weights == pytest.approx(held, rel=0.01)
        assert summary.scheme is not None
    monkeypatch.setattr(module, "machine_memory", lambda: held)
    load(directory, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "machine_memory", lambda: held - 1)
    monkeypatch.setattr(module, "read_tensor", None)
    with pytest.raises(CapacityError) as caught:
        load(directory, dtype=torch.bfloat16)
    assert ("dgemma quantize" in str(caught.value)) == (form == "float32") and "\n" not in str(caught.value)


def test_loading_holds_the_model_once(copies: Formats, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the network there is never more than one expert's matrix (here: one tensor) in memory."""
    alive: list[int] = []
    decode = module.decode

    def watched(*arguments: Any) -> Any:
        found = decode(*arguments)
        alive.append(found.nbytes)
        return found

    monkeypatch.setattr(module, "decode", watched)
    load(copies("int4"))
    assert len(alive) == 4 * 2 - 1 + 3 * 2 + 1 + 2 * 4 * 3
    assert max(alive) == max(96 * 64 + 96 * 4, 128 * 64 // 2 + 128 * 4 * 2)


PACKED = "model.decoder.layers.0.experts.2.up_proj.weight_packed"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "an expert's matrix is missing": (
        lambda t: [t.pop(n) for n in list(t) if ".0.experts.2.up_proj." in n], "experts.2.up_proj.weight is missing",
    ),
    "an expert's scale is missing": (lambda t: t.pop(PACKED.replace("packed", "scale")), "2.up_proj.weight_scale is"),
    "an expert too many": (
        lambda t: t.update({PACKED.replace("experts.2", "experts.4"): t[PACKED].clone()}), "experts.4.up_proj",
    ),
    "fused experts beside": (
        lambda t: t.update({"model.decoder.layers.0.experts.gate_up_proj": torch.zeros(4, 64, 64)}), "fused",
    ),
    "another shape": (lambda t: t.update({PACKED: t[PACKED][:, :-1].contiguous()}), "weight_packed has shape [32, 7]"),
    "another shape inside": (
        lambda t: t.update({PACKED.replace("packed", "shape"): torch.tensor([64, 32])}), "weight_shape says [64, 32]",
    ),
    "other groups in one expert": (
        lambda t: t.update({PACKED.replace("packed", "scale"): torch.ones(32, 4)}), "must share one layout",
    ),
    "order of activations": (
        lambda t: t.update({PACKED.replace("packed", "g_idx"): torch.zeros(64, dtype=torch.int32)}), "weight_g_idx",
    ),
    "scales that are no numbers": (
        lambda t: t[PACKED.replace("packed", "scale")].fill_(float("inf")), "weight_scale holds NaN or infinity",
    ),
    "a copy of the head that differs": (
        lambda t: t.update({"lm_head.weight_packed": torch.zeros(96, 16, dtype=torch.int32)}), "lm_head.weight_packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_files(damage: str, copies: Formats, load: Any, tmp_path: Path) -> None:
    """One line that names the tensor and the file."""
    change, said = DAMAGES[damage]
    shutil.copytree(copies("int4"), tmp_path / "x")
    tensors = tensors_of(tmp_path / "x")
    change(tensors)
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "x")
    assert said in str(caught.value) and "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("section", "said"), [
    (None, "quantization_config: missing, but model.decoder.embed_tokens is stored as pack-quantized"),
    ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not read"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
     "says float8, the weights are int8"),
])  # fmt: skip
def test_sections_that_do_not_fit(section: Any, said: str, copies: Formats, load: Any, tmp_path: Path) -> None:
    shutil.copytree(copies("int8"), tmp_path / "x")
    data = json.loads((tmp_path / "x" / "config.json").read_text())
    data["quantization_config"] = section
    (tmp_path / "x" / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "x")
    assert said in str(caught.value) and "config.json" in str(caught.value)


def test_tied_copies_in_few_bits(copies: Formats, load: Any, tmp_path: Path) -> None:
    """Tools that save the head and the encoder's side too are understood, as long as they say the same."""
    shutil.copytree(copies("int4"), tmp_path / "x")
    tensors = tensors_of(tmp_path / "x")
    for part in ("packed", "scale", "shape"):
        tensors[f"lm_head.weight_{part}"] = tensors[f"model.decoder.embed_tokens.weight_{part}"].clone()
        own = PACKED.replace("packed", part)
        tensors[own.replace("model.decoder", "model.encoder.language_model")] = tensors[own].clone()
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    assert torch.equal(look(load(tmp_path / "x")), look(load(copies("int4"))))
    tensors[PACKED.replace("model.decoder", "model.encoder.language_model")][0, 0] += 1
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.raises(DGemmaError, match="differs from"):
        load(tmp_path / "x")
