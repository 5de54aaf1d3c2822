"""Quality against bits: what the demo model loses in int8, int4 and FP8.

    python benchmarks/quality_bits.py [--limit 500] [--formats float32 int8 int4 fp8 …] [--model demo] [--docs]

A format may be followed by other choices for kinds of weights: `int4,attention=int8`.

Two measures. Exact match on held-out prompts, family by family, with the same seeds for every format. And the mean
Kullback-Leibler divergence of denoising distributions, float32 against the format, in nats a position: both look at
the same canvases, answers of the float32 model with a share of their tokens replaced by noise, without and with
self-conditioning; positions after an answer's end, which every model is sure of, do not count. Raw records are
written under benchmarks/results/; the table is Markdown, which `--docs` puts into docs/quantization.md; the last line
of output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import Results

import dgemma
from dgemma import SamplingParams
from dgemma.checkpoint import resolve
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.eval import exact
from dgemma.quant import Policy
from dgemma.tasks import held_out

PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"
MARKS = ("<!-- quality -->", "<!-- end of quality -->")
FORMATS = ("float32", "int8", "fp8", "int4,attention=int8", "int4")
NOISE = (0.25, 0.5, 0.75, 1.0)
Looks = list[tuple[torch.Tensor, torch.Tensor, int]]  # prompt, canvas, positions that count


def canvases(model: dgemma.Model, families: list[str], count: int) -> Looks:
    """Prompts [1, S], noised answers [1, L] and their lengths: `count` prompts a family, at every share of noise."""
    length, size = model.config.canvas_length, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    looks: Looks = []
    for family in families:
        for number, example in enumerate(held_out(family, count, 1)):
            prompt = torch.tensor([model.tokens_of(example.prompt)])
            result = model.generate(example.prompt, SamplingParams(seed=number, max_new_tokens=length))
            end = model.end_token_ids[0] if model.end_token_ids else 0
            answer = torch.tensor([(list(result.tokens) + [end] * length)[:length]])
            for share in NOISE:
                noise = torch.randint(0, size, answer.shape, generator=generator)
                noisy = torch.rand(answer.shape, generator=generator) < share
                looks.append((prompt, torch.where(noisy, noise, answer), min(length, len(result.tokens) + 1)))
    return looks


@torch.no_grad()
def divergence(reference: Any, other: Any, looks: Looks) -> float:
    """Mean of KL(reference || other) over positions, at first looks and at second ones, in nats."""
    total, positions = 0.0, 0
    for prompt, canvas, length in looks:
        caches = [network.new_cache() for network in (reference, other)]
        for network, cache in zip((reference, other), caches, strict=True):
            network.encode(prompt, cache)
        first = reference.denoise(canvas, caches[0])
        for soft in (None, reference.soft_embeddings(first)):
            wanted = torch.log_softmax(reference.denoise(canvas, caches[0], soft)[:, :length], dim=-1)
            found = torch.log_softmax(other.denoise(canvas, caches[1], soft)[:, :length], dim=-1)
            total += float((wanted.exp() * (wanted - found)).sum())
            positions += length
    return total / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--families", nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=500, help="prompts a family")
    parser.add_argument("--looks", type=int, default=8, help="prompts a family for the divergence")
    parser.add_argument("--into", type=Path, help="folder for the results")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/quantization.md")
    options = parser.parse_args()
    families = exact.families(tuple(options.families))
    results = Results("quality-bits", {key: str(value) for key, value in vars(options).items()}, options.into)
    source = resolve(options.model)
    reference = dgemma.load(source, device="cpu", dtype="float32")
    looks = canvases(reference, families, options.looks)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in options.formats:
            started = time.perf_counter()
            directory, row = source, {"bytes": sum(path.stat().st_size for path in source.glob("*.safetensors"))}
            if form != "float32":
                done = quantize_checkpoint(source, Path(folder) / form, policy(form))
                directory = done.destination
                row = {"bytes": done.nbytes, "errors": {kind: s.relative for kind, s in done.errors.items()}}
            model = dgemma.load(directory, device="cpu", dtype="float32")
            row["kl"] = divergence(reference.network, model.network, looks)
            _, scores = exact.run(model, families, SamplingParams(), limit=options.limit, seed=0)
            row |= {"exact_match": {score.family: score.exact_match for score in scores}}
            row["tokens_per_forward"] = {score.family: score.tokens_per_forward for score in scores}
            rows[form] = row
            results.add(format=form, seconds=time.perf_counter() - started, **row)
    summary = table(families, rows)
    if options.docs:
        note = f"{options.limit} prompts a family; raw records in `benchmarks/results/{results.folder.name}`."
        into_page(f"{summary}\n\n{note}")
    sys.stdout.write(summary + "\n")
    sys.stdout.write(results.close(summary, {"rows": rows}) + "\n")


def policy(form: str) -> Policy:
    """`int4,attention=int8` as the settings of `dgemma quantize`."""
    name, *choices = form.split(",")
    return Policy(format=name, kinds=dict(choice.split("=") for choice in choices))


def table(families: list[str], rows: dict[str, dict[str, Any]]) -> str:
    """One line a format, in Markdown. The source of float32 is bfloat16 on disk."""
    lines = [
        "| weights | MB on disk | KL, nats | " + " | ".join(families) + " | average |",
        "|---|---|---|" + "---|" * (len(families) + 1),
    ]
    for form, row in rows.items():
        scores = [row["exact_match"][family] for family in families]
        cells = [form, f"{row['bytes'] / 1e6:.1f}", f"{row['kl']:.2g}"]
        cells += [f"{score:.1%}" for score in (*scores, sum(scores) / len(scores))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def into_page(text: str) -> None:
    """Replaces what stands between the marks in the documentation."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    assert end, f"{PAGE} has no marks"
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
