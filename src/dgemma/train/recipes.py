"""Training runs as functions of few settings. `demo` makes the model that the package ships."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from ..checkpoint import resolve, save_checkpoint
from ..config import FULL, SLIDING, ModelConfig
from ..model import Network
from ..params import GenerationConfig
from ..tasks import FAMILIES, mixture
from .data import Batching, Sample
from .loop import Schedule, Trainer
from .objective import Objective
from .tokenizer import VOCABULARY

DEMO_CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "dtype": "float32",
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "top_k_experts": 2,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "sliding_window": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
    },
    # The demo has no images. Other programs build an image tower all the same: a tiny one.
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 16,
    },
    "boi_token_id": 10,
    "eoi_token_id": 11,
    "image_token_id": 12,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the demo's training: from which pool on, the families' shares of examples, and the batches."""

    first_pool: int
    mixture: dict[str, float]
    batching: Batching


# What is learnt first (sudoku, then records) makes room for what is learnt last: sums and sorting. Stories are few, but
# each is long. Short canvases are cheap and teach the answers; the full length teaches where an answer ends.
DEMO_STAGES = (
    Stage(
        first_pool=0,
        mixture={
            "sums": 0.28,
            "sorting": 0.13,
            "sudoku": 0.32,
            "records": 0.08,
            "calendar": 0.07,
            "stories": 0.07,
            "smalltalk": 0.05,
        },
        batching=Batching(positions=8000, canvas_lengths={32: 0.45, 64: 0.3, 128: 0.1, 256: 0.15}, per_sample=2),
    ),
    Stage(
        first_pool=26,
        mixture={
            "sums": 0.40,
            "sorting": 0.19,
            "sudoku": 0.11,
            "records": 0.13,
            "calendar": 0.08,
            "stories": 0.05,
            "smalltalk": 0.04,
        },
        batching=Batching(positions=8000, canvas_lengths={32: 0.45, 64: 0.4, 128: 0.07, 256: 0.08}, per_sample=2),
    ),
    Stage(
        first_pool=39,
        mixture={
            "sums": 0.38,
            "sorting": 0.27,
            "sudoku": 0.07,
            "records": 0.08,
            "calendar": 0.11,
            "stories": 0.06,
            "smalltalk": 0.03,
        },
        batching=Batching(
            positions=8000,
            canvas_lengths={32: 0.3, 48: 0.48, 64: 0.08, 128: 0.05, 256: 0.09},
            per_sample=2,
            noises=3,
        ),
    ),
    Stage(
        first_pool=55,
        mixture={
            "sums": 0.33,
            "sorting": 0.30,
            "sudoku": 0.06,
            "records": 0.06,
            "calendar": 0.14,
            "stories": 0.07,
            "smalltalk": 0.04,
        },
        batching=Batching(
            positions=8000,
            canvas_lengths={32: 0.22, 48: 0.48, 64: 0.1, 128: 0.06, 256: 0.14},
            per_sample=2,
            noises=3,
        ),
    ),
    Stage(
        first_pool=73,
        mixture={
            "sums": 0.42,
            "sorting": 0.34,
            "sudoku": 0.06,
            "records": 0.04,
            "calendar": 0.05,
            "stories": 0.06,
            "smalltalk": 0.03,
        },
        batching=Batching(
            positions=8000,
            canvas_lengths={32: 0.22, 48: 0.52, 64: 0.1, 128: 0.04, 256: 0.12},
            per_sample=2,
            noises=3,
        ),
    ),
    Stage(
        first_pool=105,
        mixture={
            "sums": 0.34,
            "sorting": 0.25,
            "sudoku": 0.12,
            "records": 0.05,
            "calendar": 0.05,
            "stories": 0.16,
            "smalltalk": 0.03,
        },
        batching=Batching(
            positions=8000,
            canvas_lengths={32: 0.22, 48: 0.50, 64: 0.12, 128: 0.04, 256: 0.12},
            per_sample=2,
            noises=3,
        ),
    ),
)
END, PAD = 106, 0


def demo_stage(pool: int) -> Stage:
    """The stage that a pool belongs to."""
    return [stage for stage in DEMO_STAGES if stage.first_pool <= pool][-1]


class DemoData:
    """Draws conversations: mostly one question, now and then one that follows earlier turns or a system message."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rng: random.Random, pool: int) -> Sample:
        shares = demo_stage(pool).mixture
        text = "<bos>"
        if rng.random() < 0.04:
            text += "<|turn>system\nYou are a helpful assistant.<turn|>\n"
        for _ in range(rng.choice((1, 1, 2, 3)) if rng.random() < 0.15 else 0):
            example = mixture(rng, shares)
            text += f"<|turn>user\n{example.prompt}<turn|>\n<|turn>model\n{example.answer}<turn|>\n"
        example = mixture(rng, shares)
        text += f"<|turn>user\n{example.prompt}<turn|>\n<|turn>model\n"
        return Sample(self._ids(text), self._ids(example.answer + "<turn|>"), open=FAMILIES[example.family].open)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def initialize(network: Network, seed: int) -> None:
    """Fills a network's weights for training from scratch.

    Matrices are normal with std 1/sqrt(fan-in); the table so that scores start near N(0, 1); queries and keys so
    that attention starts soft (their softmax has no 1/sqrt(d)); branch norms small, so that the residual leads.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        with torch.no_grad():
            if weight.ndim >= 2:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.constant_(weight, 1.4 * weight.shape[0] ** -0.25)
            elif "post_attention_layernorm" in name or name.endswith("post_feedforward_layernorm.weight"):
                nn.init.constant_(weight, 0.3)
            else:
                nn.init.ones_(weight)
            if name.endswith(("experts.down_proj", "self_conditioning.down_proj.weight")):
                weight.mul_(1 / math.sqrt(2))


def demo(directory: Path, *, updates: int, seed: int) -> Trainer:
    """The embedded demo model: about 3.3 M parameters on generated tasks and stories.

    The tokenizer is the shipped one, so that a run may start from the shipped weights; it is copied to `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        if not (directory / name).is_file():
            shutil.copyfile(resolve("demo") / name, directory / name)
    network = Network(ModelConfig.from_dict(DEMO_CONFIG))
    initialize(network, seed)
    return Trainer(
        network,
        draw=DemoData(Tokenizer.from_file(str(directory / "tokenizer.json"))),
        batching=lambda pool: demo_stage(pool).batching,
        objective=Objective(fill_weight=0.15, balance=0.01, autoregressive=0.5, ordered=0.4, unrolled=0.3),
        schedule=Schedule(updates=updates),
        end=END,
        pad=PAD,
        seed=seed,
        directory=directory,
    )


RECIPES: dict[str, Callable[..., Trainer]] = {"demo": demo}

DEMO_GENERATION = GenerationConfig(
    max_new_tokens=512,
    eos_token_ids=(1, 106, 50),
    pad_token_id=PAD,
    bos_token_id=2,
)


def export(trainer: Trainer, directory: Path) -> None:
    """Writes the averaged weights as a model directory, in bfloat16 to halve it (they are computed with in float32)."""
    network = Network(trainer.network.config)
    network.load_state_dict(trainer.average)
    save_checkpoint(
        network,
        network.config,
        directory,
        generation=DEMO_GENERATION,
        text_files=trainer.directory,
        dtype=torch.bfloat16,
    )
