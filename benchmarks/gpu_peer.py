"""The peer on a GPU: transformers' `generate` for the same sizes, in bfloat16, compiled, with a static cache."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from gpu_rows import NEVER
from gpu_weights import TINY
from make_26b import configuration


def peer_rate(
    layers: int, tiny: bool, device: torch.device, given: int, new: int, rounds: int, steps: int = 16
) -> list[float]:
    """Tokens a second of each round, one request at a time, at so many fixed steps a canvas; compiling comes before."""
    warnings.filterwarnings("ignore")
    model = _model(layers, tiny, device)
    ids = torch.full((1, given), 17, device=device)
    settings: dict[str, Any] = {"max_new_tokens": new, "max_denoising_steps": steps, "confidence_threshold": NEVER}
    if device.type == "cuda":
        settings["cache_implementation"] = "static"
    rates = []
    with torch.no_grad():
        for number in range(rounds + 1):
            started = time.perf_counter()
            out = model.generate(ids, **settings)
            if device.type == "cuda":
                torch.cuda.synchronize()
            count = getattr(out, "sequences", out).shape[1] - given
            if number:
                rates.append(count / (time.perf_counter() - started))
    return rates


def _model(layers: int, tiny: bool, device: torch.device) -> Any:
    """transformers' model with random weights and next to no vision part."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    content = configuration(layers)["text_config"] | (TINY if tiny else {})
    content |= {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 2}
    content.pop("model_type")
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, position_embedding_size=16,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**content), vision_config=vision, canvas_length=8 if tiny else 256
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):  # its buffers are computed there; weights are drawn anew below
            model = DiffusionGemmaForBlockDiffusion(config)
    finally:
        torch.set_default_dtype(before)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=weight.shape[-1] ** -0.5)
        else:
            weight.data.fill_(1.0)
    return model.eval()
