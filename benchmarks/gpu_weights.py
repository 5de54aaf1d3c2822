"""Random networks at any size, filled where they will run: the 26B's sizes in seconds on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from make_26b import centred, configuration
from torch import Tensor, nn

from dgemma.checkpoint.load import empty_network
from dgemma.checkpoint.quantize import plan
from dgemma.config import ModelConfig
from dgemma.model import Network
from dgemma.quant import KINDS, Policy, Quantized, kind_of

FORMS = ("bfloat16", "fp8", "int8", "int4", "nvfp4")
# NVIDIA's file has experts in NVFP4, and the rest in bfloat16.
EXPERTS_ALONE = Policy(format="int4", group=64, search=False, kinds=dict.fromkeys(set(KINDS) - {"experts"}, "keep"))
GROUPS = {"fp8": None, "nvfp4": 16}  # inputs that share a scale, where the form leaves no choice
# Everything that the real sizes have, in small: grouped heads, a window, sliding and full layers, groups of 32.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 512,
}


def config_of(layers: int, *, tiny: bool) -> ModelConfig:
    """The released sizes with so many layers, the last a full one; or tiny ones with a canvas of 8."""
    content = configuration(layers)
    if tiny:
        content["text_config"] |= TINY
        content |= {"canvas_length": 8, "dtype": "float32"}
    return ModelConfig.from_dict(content)


def network_of(config: ModelConfig, form: str, device: torch.device, *, seed: int = 0) -> Network:
    """A network with random weights that keep activations of the order of one, its matrices in a form as
    `dgemma quantize` holds them, or as NVIDIA's file in NVFP4. Routing is near uniform and no word of the vocabulary
    unlikely: the worst case.
    """
    generator = torch.Generator(device).manual_seed(seed)
    network = empty_network(config)
    dtype, held = getattr(torch, config.dtype), held_in(network, form)
    for name, shape in shapes_of(network).items():
        path, _, last = name.rpartition(".")
        owner = network.get_submodule(path)
        if name in held:
            del owner._parameters[last]
            setattr(owner, last, random_quantized(*held[name], shape, generator))
            continue
        if len(shape) == 1:
            values = 1 + 0.1 * torch.randn(shape, generator=generator, device=device)
        else:
            values = torch.empty(shape, dtype=dtype, device=device)
            for part in values.view(-1, shape[-1]).split(1 << 16):
                part.normal_(std=shape[-1] ** -0.5, generator=generator)
        owner._parameters[last] = nn.Parameter(values.to(dtype), requires_grad=False)
    return network


def shapes_of(network: Network) -> dict[str, tuple[int, ...]]:
    """Of all weights, by name."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def held_in(network: Network, form: str) -> dict[str, tuple[str, int | None]]:
    """Of the weights that are not floats in a network of a form: that of `Quantized`, and the inputs that share a
    scale, by name."""
    if form in ("bfloat16", "float32"):
        return {}
    policy, shapes = EXPERTS_ALONE if form == "nvfp4" else Policy(format=form, search=False), shapes_of(network)
    layouts = plan(policy, shapes)[0]
    found = {name: layouts[kind] for name in shapes if (kind := kind_of(name)) in layouts}
    return {
        name: (form if layout.bits == 4 or form == "fp8" else "int8", GROUPS.get(form, layout.group))
        for name, layout in found.items()
    }


def nbytes(network: Network) -> int:
    """Bytes of all weights."""
    held = [weight.nbytes for weight in network.quantized().values()]
    return sum(held) + sum(p.nbytes for p in network.parameters())


def random_quantized(form: str, group: int | None, shape: tuple[int, ...], generator: torch.Generator) -> Quantized:
    """A weight drawn as it is held, on the generator's device, of about 1 / sqrt(inputs).

    Args:
        form: that of `Quantized`.
        group: inputs that share a scale; of "int4" and "int8".
    """
    device, (*rows, width) = generator.device, shape
    bits = 4 if form in ("int4", "nvfp4") else 8
    factors = None
    if form == "fp8":
        data: Tensor = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        for part in data.view(-1, width).split(1 << 16):
            part.copy_((torch.randn(part.shape, generator=generator, device=device) * 100).clamp_(-448, 448))
        spread = 100.0
    else:
        data = torch.empty(*rows, width * bits // 8, dtype=torch.uint8, device=device)
        data.random_(0, 256, generator=generator)
        data, spread = centred(data, bits) if form != "nvfp4" else (data, 5.85)
    group = GROUPS.get(form, group)
    scales = torch.rand(*rows, width // group if group else 1, generator=generator, device=device) * 0.5 + 0.75
    if form == "nvfp4":
        factors = torch.full((*rows, 1), width**-0.5 / spread, device=device)
        scales = scales.to(torch.float8_e4m3fn)
    else:
        scales *= width**-0.5 / spread
    return Quantized(bits=bits, group=group, data=data, scales=scales, factors=factors)
