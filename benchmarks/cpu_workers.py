"""The two sides of `cpu_step.py`, each a process of its own that works only while it is asked to.

    python benchmarks/cpu_workers.py dgemma|keeping|transformers DIRECTORY [DTYPE]

Reads one command a line, answers each with one JSON object on stdout: `steps N SEED`, `encode N SEED`, `scores FILE`,
and for dgemma `parts N SEED`, `peak ROUNDS` and `shared`. The side `keeping` is dgemma that keeps a packed copy. Both
sides have the same weights: transformers gets, in bfloat16 or in DTYPE, the numbers that the values in few bits stand
for.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.checkpoint import load_network
from dgemma.checkpoint.names import disk_name
from dgemma.config import ModelConfig
from dgemma.kernels import cpu
from dgemma.model.linear import Linear

PROMPT = 256  # tokens before the canvas
CONTEXT = 8192
LOOKED_AT = 8  # positions whose scores are compared


def memory(field: str) -> int:
    """Bytes of this process: "VmHWM" at most so far, "VmRSS" now."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def tokens(config: ModelConfig, count: int, seed: int) -> torch.Tensor:
    """Random ids [1, count]."""
    return torch.randint(0, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


class Ours:
    """dgemma, through the engine."""

    def __init__(self, directory: Path, keep: bool):
        settings = EngineSettings(max_batch=1, max_model_len=CONTEXT, step_tokens=CONTEXT, prefix_reuse=False)
        self.model = dgemma.load(directory, device="cpu", engine=settings, keep_packed=keep)
        self.config = self.model.config

    def steps(self, count: int, seed: int) -> dict[str, Any]:
        """A canvas of so many steps; seconds of the first, which encodes the prompt too, and of each after it."""
        params = SamplingParams(
            seed=seed, max_new_tokens=self.config.canvas_length, max_denoising_steps=count, confidence_threshold=1e-9
        )
        prompt = tokens(self.config, PROMPT, seed)[0].tolist()
        times = [time.perf_counter()]
        for event in self.model.submit(prompt, params, drafts=True):
            if isinstance(event, dgemma.Draft):
                times.append(time.perf_counter())
        first, *seconds = [after - before for before, after in itertools.pairwise(times)]
        return {"first": first, "seconds": seconds}

    def shared(self) -> dict[str, Any]:
        """Bytes that are its own, bytes of mapped files, and all of that with its share of what others have too."""
        rollup = Path("/proc/self/smaps_rollup").read_text()
        found = dict(re.findall(r"^(Pss|Anonymous):\s+(\d+) kB", rollup, re.MULTILINE))
        own = {"own": int(found["Anonymous"]) * 1024, "share": int(found["Pss"]) * 1024}
        return own | {"files": memory("RssFile")}

    def encode(self, count: int, seed: int) -> dict[str, Any]:
        """A prompt of so many tokens, and the one token that follows it."""
        params = SamplingParams(seed=seed, max_new_tokens=1, mode="autoregressive", temperature=0.0)
        prompt = tokens(self.config, count, seed)[0].tolist()
        started = time.perf_counter()
        for _ in self.model.submit(prompt, params):
            pass
        return {"seconds": [time.perf_counter() - started]}

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """Of the first positions of a canvas."""
        cache = self.model.network.new_cache()
        self.model.network.encode(tokens(self.config, PROMPT, 1), cache)
        return self.model.network.denoise(tokens(self.config, self.config.canvas_length, 2), cache)[0, :LOOKED_AT]

    def parts(self, count: int, seed: int) -> dict[str, Any]:
        """Median seconds of a step by part, over a canvas of so many steps."""
        network, spent = self.model.network, {}  # type: ignore[var-annotated]

        def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*given: Any, **named: Any) -> Any:
                started = time.perf_counter()
                result = call(*given, **named)
                spent.setdefault(part, []).append(time.perf_counter() - started)
                if part == "vocabulary":
                    looks.append((given, named))
                return result

            return wrapped

        looks: list[Any] = []
        owners: list[tuple[Any, str, str]] = [(network, "look", "vocabulary")]
        owners.append((network.self_conditioning, "condition", "self-conditioning"))
        for block in network.layers:
            inner = [module for module in block.self_attn.modules() if isinstance(module, Linear)]
            owners += [(module, "forward", "attention projections") for module in inner]
            owners += [(block.self_attn, "forward", "attention"), (block.mlp, "forward", "dense MLP")]
            owners += [(block.experts, "forward", "experts"), (block.router, "forward", "router")]
        for owner, name, part in owners:
            setattr(owner, name, timed(part, getattr(owner, name)))
        try:
            whole = self.steps(count, seed)["seconds"]
        finally:
            for owner, name, _ in owners:
                delattr(owner, name)
        # The first step encodes the prompt too: of all calls of a part, the last steps' share.
        found = {
            part: sum(times[-len(times) * len(whole) // count :]) / len(whole)
            for part, times in spent.items()
        }  # fmt: skip
        (hidden, wish, *rest), _ = looks[-1]
        alone = []
        for _ in range(3):
            started = time.perf_counter()
            cpu.vocabulary(hidden, network.embed_tokens.weight, wish, uniform=rest[0], hint=rest[1], soft=False)
            alone.append(time.perf_counter() - started)
        share = cpu.vocabulary(hidden, network.embed_tokens.weight, wish, uniform=rest[0], hint=rest[1]).share
        found["vocabulary scores"] = statistics.median(alone)
        found["soft embeddings"] = found.pop("vocabulary") - found["vocabulary scores"]
        found["attention itself"] = found.pop("attention") - found["attention projections"]
        step = sum(whole) / len(whole)
        found["the rest"] = step - sum(found.values())
        return {"parts": found, "step": step, "share_blended": share}

    def peak(self, rounds: int) -> dict[str, Any]:
        """GOP/s of products whose weights stay in the cores' caches, the better of 4 and 8 bits."""
        from kernels import weight

        best = 0.0
        x = torch.randn(96 * torch.get_num_threads(), 1024)
        for small in (weight(4, 64, 256, 1024), weight(8, None, 256, 1024)):
            times = []
            for _ in range(rounds):
                started = time.perf_counter()
                for _ in range(50):
                    cpu.linear(x, small)
                times.append(time.perf_counter() - started)
            best = max(best, 50 * 2.0 * len(x) * 256 * 1024 / statistics.median(times) / 1e9)
        return {"gops": best, "isa": cpu.isa()}


class Theirs:
    """transformers' own classes, in bfloat16 or float32."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        warnings.filterwarnings("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.config = ModelConfig.read(directory / "config.json")
        network = load_network(directory, self.config, dtype=dtype, dequantize=True)
        weights = {disk_name(name): tensor.detach() for name, tensor in network.state_dict().items()}
        del network
        content = {key: value for key, value in self.config.raw.items() if key != "quantization_config"}
        # A tower for images as small as it may be: it takes no part.
        tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = transformers.Gemma4VisionConfig(**tiny, num_key_value_heads=2, head_dim=8, position_embedding_size=16)
        config = transformers.DiffusionGemmaConfig.from_dict(content | {"vision_config": vision.to_dict()})
        self.model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype
        ).eval()

    def steps(self, count: int, seed: int) -> dict[str, Any]:
        """A canvas of so many steps; seconds of each but the first, which has no self-conditioning."""
        times: list[float] = []

        class Clock:
            """A streamer that only looks at the clock."""

            def put(self, value: Any) -> None: ...

            def put_draft(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None: ...

        torch.manual_seed(seed)
        self.model.generate(
            tokens(self.config, PROMPT, seed),
            max_new_tokens=self.config.canvas_length,
            max_denoising_steps=count,
            confidence_threshold=1e-9,
            streamer=Clock(),
        )
        return {"seconds": [after - before for before, after in itertools.pairwise(times)]}

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    @torch.no_grad()
    def encode(self, count: int, seed: int) -> dict[str, Any]:
        """A prompt of so many tokens into the cache."""
        prompt, cache = tokens(self.config, count, seed), self._cache()
        started = time.perf_counter()
        self.model.model.encoder(input_ids=prompt, past_key_values=cache)
        return {"seconds": [time.perf_counter() - started]}

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """Of the first positions of a canvas."""
        cache = self._cache()
        self.model.model.encoder(input_ids=tokens(self.config, PROMPT, 1), past_key_values=cache)
        canvas = tokens(self.config, self.config.canvas_length, 2)
        logits = self.model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=None).logits
        found: torch.Tensor = logits[0, :LOOKED_AT]
        return found


def main() -> None:
    """Loads, then does what each line says."""
    side, directory = sys.argv[1], Path(sys.argv[2])
    started = time.perf_counter()
    dtype = getattr(torch, sys.argv[3] if len(sys.argv) > 3 else "bfloat16")
    worker: Any = Theirs(directory, dtype) if side == "transformers" else Ours(directory, side == "keeping")
    answer: dict[str, Any] = {"loaded": time.perf_counter() - started}
    while True:
        sys.stdout.write(json.dumps(answer | {"most": memory("VmHWM"), "now": memory("VmRSS")}) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline().split()
        if not line:
            return
        if line[0] == "scores":
            torch.save(worker.scores().float().clone(), line[1])
            answer = {}
        else:
            answer = getattr(worker, line[0])(*map(int, line[1:]))


if __name__ == "__main__":
    main()
